"""Learning one task: epochs, schedule, best weights; and measuring what was learned."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpm.methods.base import Method
from gpm.options import Options
from gpm.seeds import derived_seed, generator
from gpm.steps import batches, make_steps
from gpm.task import Split, Task

State = dict[str, Any]


@dataclass
class Plateau:
    """The paper's schedule: divide lr when the validation loss has not improved for `patience` epochs.

    The task ends before a learning rate below `lr_min` is used. Weights are not rolled back when lr falls.

    Attributes:
        lr: the rate of the next epoch.
        best: the lowest validation loss so far; improved means strictly lower.
        left: epochs without improvement that remain until lr falls.
    """

    lr: float
    lr_min: float
    factor: float
    patience: int
    best: float = float("inf")
    left: int = -1

    def __post_init__(self) -> None:
        if self.left < 0:
            self.left = self.patience

    def step(self, valid_loss: float) -> bool:
        """Take an epoch's validation loss; returns whether it improved."""
        if valid_loss < self.best:
            self.best, self.left = valid_loss, self.patience
            return True
        self.left -= 1
        if self.left == 0:
            self.lr, self.left = self.lr / self.factor, self.patience
        return False

    @property
    def finished(self) -> bool:
        """Whether lr has fallen below lr_min."""
        return self.lr < self.lr_min


@dataclass
class TaskProgress:
    """How far a task has been learned: with the weights, all that is needed to go on at an epoch boundary."""

    schedule: Plateau
    epoch: int = 0
    best_weights: dict[str, Tensor] | None = None
    optimizer: State | None = None

    def state_dict(self) -> State:
        """Plain values and tensors only."""
        return vars(self) | {"schedule": vars(self.schedule)}

    @classmethod
    def from_state_dict(cls, state: State) -> TaskProgress:
        """The progress that `state_dict` described."""
        return cls(**state | {"schedule": Plateau(**state["schedule"])})


@dataclass(frozen=True)
class Epoch:
    """One line of epochs.jsonl: losses are means over images, accuracies percent."""

    task: int
    epoch: int
    lr: float
    train_loss: float
    valid_loss: float | None
    valid_accuracy: float | None
    seconds: float


def start_task(options: Options) -> TaskProgress:
    """Each task starts again at the initial learning rate."""
    return TaskProgress(Plateau(options.lr, options.lr_min, options.lr_factor, options.lr_patience))


def train_task(
    method: Method,
    t: int,
    task: Task,
    options: Options,
    progress: TaskProgress,
    on_epoch: Callable[[Epoch, TaskProgress], None],
) -> None:
    """Learn task t; with the plateau schedule the weights of the best validation loss are left in the model.

    Args:
        method: says how; it holds the model.
        task: its tensors, on the model's device.
        options: n_epochs, batch sizes, learning rate and schedule.
        progress: from `start_task`, or where an interrupted run left off.
        on_epoch: called at every epoch boundary with the epoch's numbers and the progress.
    """
    model, schedule = method.model, progress.schedule
    parameters = trainable_parameters(model, t)
    optimizer = torch.optim.SGD(parameters, lr=schedule.lr, momentum=options.momentum)
    if progress.optimizer is not None:
        optimizer.load_state_dict(progress.optimizer)
    steps = make_steps(method, optimizer, t, task, options)
    plateau = options.schedule == "plateau"
    while progress.epoch < options.n_epochs and not (plateau and schedule.finished):
        began, lr = time.perf_counter(), schedule.lr
        # Every epoch's random choices follow from its place alone, so a resumed run makes the same ones.
        torch.manual_seed(derived_seed(options.seed, "train", t, progress.epoch))
        order = torch.randperm(len(task.train.labels), generator=generator(options.seed, "order", t, progress.epoch))
        train_loss = steps.epoch(order, lr)
        valid_loss, valid_accuracy = (
            evaluate(model, t, task.valid, options.batch_size_test) if len(task.valid.labels) else (None, None)
        )
        if plateau and schedule.step(valid_loss):
            progress.best_weights = {name: value.clone() for name, value in model.state_dict().items()}
        progress.epoch += 1
        progress.optimizer = optimizer.state_dict()
        seconds = time.perf_counter() - began
        on_epoch(Epoch(t, progress.epoch, lr, train_loss, valid_loss, valid_accuracy, seconds), progress)
    if progress.best_weights is not None:
        model.load_state_dict(progress.best_weights)


@torch.no_grad()
def evaluate(model: nn.Module, t: int, split: Split, batch_size: int) -> tuple[float, float]:
    """Mean loss and accuracy (percent) on a split of task t, in eval mode and in the split's own order."""
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    n = len(split.labels)
    for start, stop in batches(n, batch_size):
        labels = split.labels[start:stop]
        logits = model(split.images[start:stop], t)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    return loss.item() / n, 100 * correct.item() / n


def trainable_parameters(model: nn.Module, t: int) -> list[nn.Parameter]:
    """What task t trains: all shared parameters that are not frozen, and of `model.heads`, if any, only head t."""
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and (not name.startswith("heads.") or name.startswith(f"heads.{t}."))
    ]
