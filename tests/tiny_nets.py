"""Tiny networks for the methods: one head for all tasks, and a residual convolutional one with a head for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.method import Method
from engine.task import Benchmark, Split, Task
from methods import METHODS
from tests import tiny

SIZE = 5  # pixels on a side


class SingleHead(nn.Module):
    """Two Linear layers without bias, one head for all tasks, as for permuted MNIST."""

    def __init__(self, seed: int = 0, n_hidden: int = 7) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.fc1 = nn.Linear(tiny.N_INPUTS, n_hidden, bias=False)
        self.fc2 = nn.Linear(n_hidden, tiny.N_CLASSES, bias=False)
        self.double()

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        return self.fc2(F.relu(self.fc1(images)))


class Residual(nn.Module):
    """Convolutions with BatchNorm, a residual sum, maps flattened into a Linear, a head for each task."""

    def __init__(self, n_tasks: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1)
        self.bn_stem, self.bn1 = (nn.BatchNorm2d(4, track_running_stats=False) for _ in range(2))
        self.fc = nn.Linear(4 * (SIZE // 2) ** 2, 6, bias=False)
        self.drop = nn.Dropout(0.1)
        self.heads = nn.ModuleList(nn.Linear(6, tiny.N_CLASSES, bias=False) for _ in range(n_tasks))
        self.double()

    def forward(self, images: Tensor, task: int) -> Tensor:
        x = F.relu(self.bn_stem(self.stem(images)))
        x = F.relu(x + self.bn1(self.conv1(x)))
        x = F.relu(self.fc(self.drop(F.max_pool2d(x, 2).flatten(1))))
        return self.heads[task](x)


def picture_task(t: int, n_train: int = 24) -> Task:
    """Noisy pictures around one of three of the task's own."""
    random = torch.Generator().manual_seed(200 + t)
    centres = 2 * torch.randn(tiny.N_CLASSES, 2, SIZE, SIZE, dtype=torch.float64, generator=random)

    def split(n: int) -> Split:
        labels = torch.randint(tiny.N_CLASSES, (n,), generator=random)
        return Split(centres[labels] + torch.randn(n, 2, SIZE, SIZE, dtype=torch.float64, generator=random), labels)

    return Task(f"pictures {t}", tiny.N_CLASSES, split(n_train), split(9), split(30))


def pictures(n_tasks: int = 3) -> Benchmark:
    return Benchmark("pictures", "embedded", [picture_task(t) for t in range(n_tasks)])


def method(model: nn.Module, name: str, **changes: Any) -> Method:
    """A method on a model, with the hyperparameters of a tiny run."""
    return METHODS[name](model, tiny.options(Path(), method=name, **changes))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def learn(method: Method, t: int, steps: int = 5) -> None:
    """A few full-batch steps on a tiny task, then what the method does after it."""
    task = tiny.task(t)
    method.before_task(t, task)
    with method.learning(t, task):
        optimizer = method.optimizer(t, lr=0.05)
        method.model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            method.backward(*task.train, t)
            optimizer.step()
            method.after_step(t)
    method.after_task(t, task)
