"""Permuted MNIST with a three-layer perceptron (paper Table 1: GPM has ACC 93.91 ± 0.16 %, BWT -3).

python main_pmnist.py --seed 2                           # GPM, the released default seed
python main_pmnist.py --method naive                     # fine-tuning
python main_pmnist.py --data embedded --n_tasks 5        # no download, seconds
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dataloader import pmnist
from engine.cli import parse, script
from engine.experiment import run
from engine.hardware import pick_device
from engine.options import Options, flag
from methods import METHODS
from models import MLP
from report.plots.run import draw_run


@dataclass(kw_only=True)
class Hyperparameters(Options):
    benchmark = "pmnist"

    n_tasks: int = flag(10, "tasks, each MNIST under a pixel permutation of its own")
    n_hidden: int = flag(100, "units of each of the two hidden layers", above=0)
    n_outputs: int = flag(10, "units of the output layer, shared by all tasks: at least the ten digits", above=0)
    n_epochs: int = flag(5, "epochs of each task")
    batch_size_train: int = flag(10, "images in a training batch: small, since five epochs are few")
    batch_size_test: int = flag(64, "images in a validation or test batch")
    seed: int = flag(2, "seed of everything random, the permutations included; the released default")
    pc_valid: float = flag(0.1, "fraction of the training images, the first ones, held out and only reported")

    lr: float = flag(0.01, "learning rate")
    schedule: str = flag("constant", "constant: --lr throughout. plateau: as for the other benchmarks")
    lr_min: float = flag(1e-5, "plateau: the task ends before lr would fall below this")
    lr_patience: int = flag(6, "plateau: epochs without a better validation loss before lr falls")
    lr_factor: float = flag(2.0, "plateau: what lr is divided by")

    # Pixels are redundant, hidden units less so: the first layer may forget 5 % of its input energy, the others 1 %.
    threshold: tuple[float, ...] = flag((0.95, 0.99, 0.99), "ε: one value, or one for each of fc1, fc2 and fc3")
    threshold_step: float = flag(0.0, "added to ε with every task learned, up to 1")
    n_samples: int | str = flag(300, "training images that the layers' inputs are read from, or 'all'")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment that a command line describes; returns the content of its summary.json."""
    options, method = parse(Hyperparameters, METHODS, argv, __doc__)
    device = pick_device(options.device)
    benchmark = pmnist.load(
        seed=options.seed,
        n_tasks=options.n_tasks,
        pc_valid=options.pc_valid,
        n_train=options.n_train,
        data=options.data,
        data_dir=options.data_dir,
        device=device,
    )
    torch.manual_seed(options.seed)
    model = MLP(n_hidden=options.n_hidden, n_outputs=options.n_outputs).to(device)
    summary = run(options, benchmark, model, method(model, options))
    draw_run(summary)
    return summary


if __name__ == "__main__":
    script(main)
