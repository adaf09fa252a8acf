"""What is timed: each benchmark's network and hyperparameters, on synthetic images, in the middle of its tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import main_cifar100
import main_cifar100_superclass
import main_five_datasets
import main_pmnist
from engine.hardware import tune
from engine.options import Options
from engine.task import Split, Task
from methods.gpm import GPM
from models import MLP, AlexNet, LeNet, ResNet18


@dataclass(frozen=True)
class Case:
    """One benchmark to time.

    Attributes:
        title: as printed.
        make_model: the network, freshly initialised.
        options: the script's defaults.
        image_shape: of one image.
        n_classes: of a task.
        n_train, n_valid: images of a task in the real benchmark: what an epoch goes through.
        columns: k by layer: where a run stands after half its tasks.
        default_columns: k / d of the layers not named there.
        pool: synthetic training images; a step draws its batch from them.
        steps: of one measurement.
    """

    title: str
    make_model: Callable[[], nn.Module]
    options: Options
    image_shape: tuple[int, ...]
    n_classes: int
    n_train: int
    n_valid: int
    columns: Mapping[str, int] = field(default_factory=dict)
    default_columns: float = 0.5
    pool: int = 512
    steps: int = 2

    def tensors(self, n: int, device: torch.device) -> Split:
        """n random images, smooth as natural ones are, and labels."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(n, *self.image_shape, generator=generator)
        if len(self.image_shape) == 3:  # neighbouring pixels resemble each other
            images = images + 4 * nn.functional.avg_pool2d(images, 5, 1, 2)
        return Split(images, torch.randint(self.n_classes, (n,), generator=generator)).to(device)

    def task(self, device: torch.device) -> Task:
        """A task of synthetic images; evaluation uses the training images."""
        train = self.tensors(self.pool, device)
        return Task("synthetic", self.n_classes, train, train, train)

    def bases(self, input_sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Random orthonormal bases of the case's sizes, float64."""
        generator = torch.Generator().manual_seed(1)
        return {
            name: torch.linalg.qr(
                torch.randn(d, self.columns.get(name, int(self.default_columns * d)), generator=generator).double()
            ).Q
            for name, d in input_sizes.items()
        }

    def method(self, kind: type[GPM], device: torch.device, *, empty: bool = False) -> GPM:
        """GPM after the first half of the tasks; with empty bases, the same step with nothing to project."""
        torch.manual_seed(2)
        model = self.make_model().to(device)
        tune(device, model, self.options)
        method = kind(model, self.options)
        if not empty:
            bases = self.bases(method.memory.input_sizes)
            method.memory.bases = {name: basis.to(device) for name, basis in bases.items()}
        method.memory.n_updates = 1
        return method


# Columns after half of the tasks, as real runs have them (in ResNet18: about half of each layer's inputs).
CASES = {
    "mlp": Case(
        "permuted MNIST, MLP",
        MLP,
        main_pmnist.Hyperparameters(),
        (784,),
        10,
        n_train=54_000,
        n_valid=6_000,
        columns={"fc1": 342, "fc2": 98, "fc3": 78},
        pool=10_000,
        steps=200,
    ),
    "alexnet": Case(
        "CIFAR-100, AlexNet",
        lambda: AlexNet([10] * 10),
        main_cifar100.Hyperparameters(),
        (3, 32, 32),
        10,
        n_train=4_750,
        n_valid=250,
        columns={"conv1": 16, "conv2": 230, "conv3": 350, "fc1": 360, "fc2": 470},
    ),
    "lenet": Case(
        "CIFAR-100 superclass, LeNet",
        lambda: LeNet([5] * 20),
        main_cifar100_superclass.Hyperparameters(),
        (3, 32, 32),
        5,
        n_train=2_375,
        n_valid=125,
        columns={"conv1": 45, "conv2": 210, "fc1": 460, "fc2": 340},
    ),
    "resnet18": Case(
        "5-datasets, ResNet18",
        lambda: ResNet18([10] * 5),
        main_five_datasets.Hyperparameters(),
        (3, 32, 32),
        10,
        n_train=47_500,
        n_valid=2_500,
        pool=256,
    ),
}
