"""A benchmark and a network so small that a whole run takes a fraction of a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import experiment
from engine.options import Options, with_flags
from engine.task import Benchmark, Split, Task
from methods import METHODS

N_INPUTS, N_CLASSES = 12, 3


def split(n: int, centres: Tensor, generator: torch.Generator, dtype: torch.dtype) -> Split:
    labels = torch.randint(N_CLASSES, (n,), generator=generator)
    noise = torch.randn(n, N_INPUTS, dtype=torch.float64, generator=generator)
    return Split((centres[labels] + noise).to(dtype), labels)


def task(t: int, n_train: int = 30, dtype: torch.dtype = torch.float64) -> Task:
    """Three noisy clusters whose centres are the task's own."""
    generator = torch.Generator().manual_seed(100 + t)
    centres = 2 * torch.randn(N_CLASSES, N_INPUTS, dtype=torch.float64, generator=generator)
    parts = {part: split(n, centres, generator, dtype) for part, n in [("train", n_train), ("valid", 9), ("test", 40)]}
    return Task(f"clusters {t}", N_CLASSES, **parts)


def benchmark(n_tasks: int = 3, n_train: int = 30, dtype: torch.dtype = torch.float64) -> Benchmark:
    sources = {"clusters": {"train": n_train, "test": 40, "sha256": "0" * 64}}
    return Benchmark("tiny", "embedded", [task(t, n_train, dtype) for t in range(n_tasks)], sources, ("made up",))


def options(folder: Path, **changes: Any) -> Options:
    """Of a short run; the folder gets the run folders."""
    values = {
        "n_tasks": 3,
        "n_epochs": 3,
        "batch_size_train": 8,
        "lr": 0.05,
        "lr_patience": 1,
        "n_samples": 10,
        "threshold": (0.9,),
        "threshold_step": 0.01,
        "data": "embedded",
        "device": "cpu",
        "output_dir": str(folder),
        "quiet": True,
    }
    return made(values | changes)


def made(values: dict[str, Any]) -> Options:
    """Options with the flags of the method that they name."""
    return with_flags(Options, METHODS[values.get("method", "gpm")])(**values)


def run(options: Options, benchmark: Benchmark, model: nn.Module) -> dict[str, Any]:
    """A run with the method that the options name."""
    return experiment.run(options, benchmark, model, METHODS[options.method](model, options))


class Network(nn.Module):
    """Two Linear layers with biases, batch-statistics BatchNorm, dropout, a head for each task."""

    def __init__(self, n_tasks: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1, self.fc2 = nn.Linear(N_INPUTS, 16), nn.Linear(16, 8)
        self.norm, self.drop = nn.BatchNorm1d(16, track_running_stats=False), nn.Dropout(0.2)
        self.heads = nn.ModuleList(nn.Linear(8, N_CLASSES, bias=False) for _ in range(n_tasks))
        self.double()
        self.n_training_batches = 0

    def forward(self, images: Tensor, task: int) -> Tensor:
        self.n_training_batches += self.training
        x = self.drop(F.relu(self.norm(self.fc1(images))))
        return self.heads[task](F.relu(self.fc2(x)))


def run_folder(output_dir: Path) -> Path:
    """The only run folder below."""
    (config,) = Path(output_dir).rglob("config.json")
    return config.parent


def epochs(output_dir: Path) -> list[dict[str, Any]]:
    """epochs.jsonl of the only run below a folder, without what differs from run to run."""
    lines = (run_folder(output_dir) / "epochs.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
