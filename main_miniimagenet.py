"""20-split miniImageNet with a reduced ResNet18 (paper Table 1: GPM has ACC 60.41 ± 0.61 %, BWT -0.7 ± 0.4).

    python main_miniimagenet.py                                              # ten epochs a task, as in the paper
    python main_miniimagenet.py --protocol later                             # up to a hundred, as in later papers
    python main_miniimagenet.py --data embedded --n_tasks 5 --n_epochs 5     # no download, two minutes

ImageNet's images may not be passed on: put them into data/miniimagenet, a folder for each class. Not run on them yet.
About 20 s an epoch on one CPU core: an hour and a quarter by the paper's protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dataloader import miniimagenet
from engine.cli import parse, script
from engine.experiment import run
from engine.hardware import pick_device
from engine.options import Options, flag
from methods import METHODS
from models import ResNet18
from report.plots.run import draw_run


@dataclass(kw_only=True)
class Hyperparameters(Options):
    benchmark = "miniimagenet"

    protocol: str = flag(
        "paper",
        "paper: ten epochs of small batches. later: what papers since use (TRGP's code): a hundred epochs at most",
        choices=("paper", "later"),
    )
    # What the later papers do otherwise. A value given on the command line wins over both protocols'.
    by_protocol = {"later": dict(n_epochs=100, batch_size_train=64)}

    n_tasks: int = flag(20, "tasks of five classes each, the first so many of the benchmark")
    n_epochs: int = flag(10, "epochs of each task, at most")
    batch_size_train: int = flag(10, "images in a training batch")
    batch_size_test: int = flag(64, "images in a validation or test batch: BatchNorm uses its statistics")
    seed: int = flag(1, "seed of everything random")
    pc_valid: float = flag(0.02, "fraction of each task's training images held out, to drive the schedule")

    lr: float = flag(0.1, "learning rate that each task starts with")
    lr_min: float = flag(1e-3, "the task ends before lr would fall below this")
    lr_patience: int = flag(5, "epochs without a better validation loss before lr falls")
    lr_factor: float = flag(3.0, "what lr is divided by")

    threshold: tuple[float, ...] = flag((0.985,), "ε: one value, or one a layer")
    threshold_step: float = flag(0.0, "added to ε with every task learned, up to 1")
    # As in 5-datasets: deeper layers have larger inputs and fewer positions, so their patches need more images.
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


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment that a command line describes; returns the content of its summary.json."""
    options, method = parse(Hyperparameters, METHODS, argv, __doc__)
    device = pick_device(options.device)
    benchmark = miniimagenet.load(
        seed=options.seed,
        n_tasks=options.n_tasks,
        pc_valid=options.pc_valid,
        n_train=options.n_train,
        data=options.data,
        data_dir=options.data_dir,
        device=device,
    )
    torch.manual_seed(options.seed)
    # all heads, so that the first tasks are the same in shorter runs
    model = ResNet18(n_classes=[5] * 20, side=84, stride=2).to(device)
    summary = run(options, benchmark, model, method(model, options))
    draw_run(summary)
    return summary


if __name__ == "__main__":
    script(main)
