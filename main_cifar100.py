"""10-split CIFAR-100 with a 5-layer AlexNet (paper Table 1: GPM has ACC 72.48 ± 0.40 %, BWT -0.9).

    python main_cifar100.py                                    # GPM, the paper's protocol
    python main_cifar100.py --method naive --n_epochs 25       # fine-tuning, shorter
    python main_cifar100.py --data embedded --n_train 50 --n_epochs 5 --n_tasks 3     # no download, a minute

About 9 s an epoch on 2 CPU cores: a full run is hours there, minutes on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dataloader import cifar100
from engine.cli import parse, script
from engine.experiment import run
from engine.hardware import pick_device
from engine.options import Options, flag
from methods import METHODS
from models import AlexNet
from report.plots.run import draw_run


@dataclass(kw_only=True)
class Hyperparameters(Options):
    benchmark = "cifar100"

    n_tasks: int = flag(10, "tasks of ten classes each, the first so many")
    class_order_seed: int | None = flag(
        None, "shuffles which classes meet in a task; default the natural order", minimum=0, below=2**63
    )
    n_epochs: int = flag(200, "epochs of each task, at most; the plateau schedule ends most tasks sooner")
    batch_size_train: int = flag(64, "images in a training batch")
    batch_size_test: int = flag(64, "images in a validation or test batch: BatchNorm uses its statistics")
    seed: int = flag(1, "seed of everything random; the released default")
    pc_valid: float = flag(0.05, "fraction of each task's training images held out, to drive the schedule")

    lr: float = flag(0.01, "learning rate that each task starts with")
    lr_min: float = flag(1e-5, "the task ends before lr would fall below this")
    lr_patience: int = flag(6, "epochs without a better validation loss before lr falls")
    lr_factor: float = flag(2.0, "what lr is divided by")

    # Later tasks need a tighter ε: their errors disturb more old tasks.
    threshold: tuple[float, ...] = flag((0.97,), "ε on the first task: one value, or one a layer")
    threshold_step: float = flag(0.003, "added to ε with every task learned, up to 1")
    # A convolution has many patches an image, so few images already span what its inputs use.
    n_samples: int | str = flag(125, "training images that a layer's inputs are read from, or 'all'")
    samples: dict[str, int] = flag(
        {"conv1": 24, "conv2": 100, "conv3": 100, "fc1": 125, "fc2": 125},
        "of those images, how many give columns to each layer",
    )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment that a command line describes; returns the content of its summary.json."""
    options, method = parse(Hyperparameters, METHODS, argv, __doc__)
    device = pick_device(options.device)
    benchmark = cifar100.load(
        seed=options.seed,
        n_tasks=options.n_tasks,
        pc_valid=options.pc_valid,
        n_train=options.n_train,
        class_order_seed=options.class_order_seed,
        data=options.data,
        data_dir=options.data_dir,
        device=device,
    )
    torch.manual_seed(options.seed)
    # all heads, so that the first tasks are the same in shorter runs
    model = AlexNet(n_classes=[10] * 10).to(device)
    summary = run(options, benchmark, model, method(model, options))
    draw_run(summary)
    return summary


if __name__ == "__main__":
    script(main)
