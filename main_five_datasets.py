"""5-datasets with a reduced ResNet18 (paper Table 1: GPM has ACC 91.22 ± 0.20 %, BWT -1).

    python main_five_datasets.py                                             # the five sets, in the paper's order
    python main_five_datasets.py --datasets mnist fashion_mnist notmnist     # some of them, or another order
    python main_five_datasets.py --data embedded --n_train 50 --n_epochs 5   # no download, two minutes

About 4 minutes an epoch of CIFAR-10 on 2 CPU cores: this benchmark wants a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dataloader import five_datasets
from engine.cli import parse, script
from engine.experiment import run
from engine.hardware import pick_device
from engine.options import Options, flag
from methods import METHODS
from models import ResNet18
from report.plots.run import draw_run


@dataclass(kw_only=True)
class Hyperparameters(Options):
    benchmark = "five_datasets"

    datasets: tuple[str, ...] = flag(
        ("cifar10", "mnist", "svhn", "fashion_mnist", "notmnist"), "the tasks and their order"
    )
    n_tasks: int = flag(5, "tasks of ten classes each, the first so many of the data sets; fewer where these are fewer")
    n_epochs: int = flag(100, "epochs of each task, at most")
    batch_size_train: int = flag(64, "images in a training batch")
    batch_size_test: int = flag(64, "images in a validation or test batch: BatchNorm uses its statistics")
    seed: int = flag(37, "seed of everything random; the released default")
    pc_valid: float = flag(0.05, "fraction of each task's training images held out, to drive the schedule")

    lr: float = flag(
        0.1, "learning rate that each task starts with: ten times the other networks', as BatchNorm allows"
    )
    lr_min: float = flag(1e-3, "the task ends before lr would fall below this")
    lr_patience: int = flag(5, "epochs without a better validation loss before lr falls")
    lr_factor: float = flag(3.0, "what lr is divided by")

    # The tasks look so different that one ε for all of them leaves room for the last.
    threshold: tuple[float, ...] = flag((0.965,), "ε: one value, or one a layer")
    threshold_step: float = flag(0.0, "added to ε with every task learned, up to 1")
    # Deeper layers have larger inputs and fewer positions, so their patches need more images. A shortcut uses as many
    # as the 3x3 convolution that reads the same input.
    n_samples: int | str = flag(100, "training images that a layer's inputs are read from, or 'all'")
    samples: dict[str, int] = flag(
        {
            "conv1": 10,
            "layer1": 10,
            "layer2": 10,
            "layer2.1.conv2": 50,
            "layer3.0": 50,
            "layer3.1": 100,
            "layer4": 100,
        },
        "of those images, how many give columns to each layer; the longest matching beginning counts",
    )

    def __post_init__(self) -> None:
        if self.n_tasks == Hyperparameters.n_tasks:  # --datasets says how many
            self.n_tasks = min(self.n_tasks, len(self.datasets))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment that a command line describes; returns the content of its summary.json."""
    options, method = parse(Hyperparameters, METHODS, argv, __doc__)
    device = pick_device(options.device)
    benchmark = five_datasets.load(
        seed=options.seed,
        datasets=options.datasets,
        n_tasks=options.n_tasks,
        pc_valid=options.pc_valid,
        protocol=options.protocol,
        n_train=options.n_train,
        data=options.data,
        data_dir=options.data_dir,
        device=device,
    )
    torch.manual_seed(options.seed)
    model = ResNet18(n_classes=[10] * len(options.datasets)).to(device)
    summary = run(options, benchmark, model, method(model, options))
    draw_run(summary)
    return summary


if __name__ == "__main__":
    script(main)
