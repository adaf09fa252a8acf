"""20-task CIFAR-100 superclass with LeNet (published for GPM over five task orders: ACC 57.7 ± 0.7 %, BWT -1.2 ± 0.4).

    python main_cifar100_superclass.py --protocol released     # the images as the published number saw them
    python main_cifar100_superclass.py --t_order 3             # another of the five published task orders
    python main_cifar100_superclass.py --data embedded --n_train 50 --n_epochs 5 --n_tasks 5    # no download, a minute

About 5 s an epoch on one CPU core: a full run is two hours there, minutes on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dataloader import cifar100_superclass
from engine.cli import parse, script
from engine.experiment import run
from engine.hardware import pick_device
from engine.options import Options, flag
from methods import METHODS
from models import LeNet
from report.plots.run import draw_run


@dataclass(kw_only=True)
class Hyperparameters(Options):
    benchmark = "cifar100_superclass"

    n_tasks: int = flag(20, "tasks of five classes each, the first so many of the order")
    t_order: int = flag(0, "which of the five published task orders, 0 to 4")
    n_epochs: int = flag(50, "epochs of each task, at most")
    batch_size_train: int = flag(64, "images in a training batch")
    batch_size_test: int = flag(64, "images in a validation or test batch")
    seed: int = flag(1, "seed of everything random; the released default")
    pc_valid: float = flag(0.05, "fraction of each task's training images held out, to drive the schedule")

    lr: float = flag(0.01, "learning rate that each task starts with")
    lr_min: float = flag(1e-5, "the task ends before lr would fall below this")
    lr_patience: int = flag(6, "epochs without a better validation loss before lr falls")
    lr_factor: float = flag(2.0, "what lr is divided by")

    # Tighter than for ten tasks, and tighter still later: there are twice as many tasks to disturb.
    threshold: tuple[float, ...] = flag((0.98,), "ε on the first task of the order: one value, or one a layer")
    threshold_step: float = flag(0.001, "added to ε with every task learned, up to 1")
    # A convolution has many patches an image, so few images already span what its inputs use.
    n_samples: int | str = flag(125, "training images that a layer's inputs are read from, or 'all'")
    samples: dict[str, int] = flag(
        {"conv1": 24, "conv2": 100, "fc1": 125, "fc2": 125}, "of those images, how many give columns to each layer"
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment that a command line describes; returns the content of its summary.json."""
    options, method = parse(Hyperparameters, METHODS, argv, __doc__)
    device = pick_device(options.device)
    benchmark = cifar100_superclass.load(
        seed=options.seed,
        t_order=options.t_order,
        n_tasks=options.n_tasks,
        pc_valid=options.pc_valid,
        protocol=options.protocol,
        n_train=options.n_train,
        data=options.data,
        data_dir=options.data_dir,
        device=device,
    )
    torch.manual_seed(options.seed)
    # all heads, so that the first tasks are the same in shorter runs
    model = LeNet(n_classes=[5] * 20).to(device)
    summary = run(options, benchmark, model, method(model, options))
    draw_run(summary)
    return summary


if __name__ == "__main__":
    script(main)
