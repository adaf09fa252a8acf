"""Any method on images of your own, with a network of torchvision or timm, without writing Python.

python main_custom.py --images pictures --tasks tasks.txt                        # GPM, ResNet18
python main_custom.py --images pictures --tasks tasks.txt --method er --seed 2   # any method and flag
python main_custom.py --images pictures --tasks tasks.txt --model mobilenet_v3_small --image_size 64

PICTURES holds a folder of images for each class, or two folders train and test that do; of the former a part is held
out for the test. TASKS has a line for each task, with the names of its classes; add a line later, and the same command
goes on with that task. docs/your_own_data.md has more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dataloader import own
from engine.cli import parse, script
from engine.experiment import run
from engine.hardware import pick_device
from engine.options import Options, flag
from engine.task import Benchmark
from engine.torchvision import import_torchvision
from gradproj.errors import InputError
from methods import METHODS
from models.named import Named
from report.plots.run import draw_run


@dataclass(kw_only=True)
class Hyperparameters(Options):
    benchmark = "custom"

    images: str = flag(
        "", "folder with one folder of images a class, or with two such folders, train and test", affects_results=False
    )
    tasks: str = flag(
        "", "text file with a line for each task: its classes, commas or spaces between them", affects_results=False
    )
    name: str = flag("", "of the sequence of tasks; default that of the folder of images", affects_results=False)
    n_tasks: int | None = flag(None, "tasks to learn, the first so many; default all of the file")
    pc_test: float = flag(
        0.2, "fraction of each class held out for the test, where there is no folder test", above=0, below=1
    )
    model: str = flag("resnet18", "network: a name in torchvision.models, else in timm")
    image_size: int = flag(64, "images are resized to so many pixels on a side", above=0, maximum=4096)
    mean: tuple[float, ...] = flag((0.485, 0.456, 0.406), "subtracted from each channel, 0 to 1; ImageNet's")
    std: tuple[float, ...] = flag((0.229, 0.224, 0.225), "what each channel is divided by; ImageNet's", above=0)

    n_epochs: int = flag(50, "epochs of each task, at most; the plateau schedule ends most tasks sooner")
    batch_size_train: int = flag(64, "images in a training batch")
    pc_valid: float = flag(0.1, "fraction of each task's training images held out, to drive the schedule")
    lr: float = flag(0.05, "learning rate that each task starts with")
    lr_min: float = flag(1e-3, "the task ends before lr would fall below this")
    threshold: tuple[float, ...] = flag((0.97,), "ε: one value, or one a layer")
    n_samples: int | str = flag(100, "training images that a layer's inputs are read from, or 'all'")


def load(options: Hyperparameters, groups: Sequence[Sequence[str]]) -> Benchmark:
    """The tasks that a command line describes, of these classes each."""
    transforms = import_torchvision("transforms")
    if options.data != "real":
        raise InputError(f"data is {options.data}; here it is always real, the images of --images")
    if len(options.mean) != 3 or len(options.std) != 3:
        raise InputError("mean and std must have 3 values each, for red, green and blue")
    transform = transforms.Compose(
        [
            transforms.Resize((options.image_size, options.image_size), antialias=True),
            transforms.ToTensor(),
            transforms.Normalize(options.mean, options.std),
        ]
    )
    train, test = own.image_folder(options.images, transform)
    if test is not None and options.pc_test != Hyperparameters.pc_test:
        raise InputError(f"pc_test is {options.pc_test}, but {options.images} has a folder test, which is used whole")
    split = {name: getattr(options, name) for name in ("pc_valid", "pc_test", "seed", "n_train")}
    name = options.name or Path(options.images).resolve().name
    return Benchmark(name, "real", own.by_class(train, groups, test, **split))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the experiment that a command line describes; returns the content of its summary.json."""
    options, method = parse(Hyperparameters, METHODS, argv, __doc__)
    if not (options.images and options.tasks):
        raise InputError("give --images DIR and --tasks FILE: the images, and which classes each task has")
    device, groups = pick_device(options.device), own.read_groups(options.tasks)
    benchmark = load(options, groups)
    options = replace(options, n_tasks=options.n_tasks or len(groups))
    torch.manual_seed(options.seed)
    model = Named(options.model, [len(group) for group in groups]).to(device)
    summary = run(options, benchmark, model, method(model, options))
    draw_run(summary)
    return summary


if __name__ == "__main__":
    script(main)
