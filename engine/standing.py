"""Where the learning of a task stands: its schedule, and all that is needed to go on from an epoch boundary."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from engine.method import Method
from engine.options import Options

State = dict[str, Any]
Weights = dict[str, Tensor]  # what Method.weights gives


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
    """How far a task has been learned, at the last epoch boundary: all that is needed to go on from there.

    Attributes:
        schedule: the learning rate to come.
        epoch: epochs done.
        lr: the schedule's rate that the optimiser's rates at the boundary are for; None where an older version did not
            say.
        start, weights, best: what training moves when the task began, at the boundary, and at the best validation loss.
        optimizer, method: their states at the boundary.
    """

    schedule: Plateau
    epoch: int = 0
    lr: float | None = None
    start: Weights | None = None
    weights: Weights | None = None
    best: Weights | None = None
    optimizer: State | None = None
    method: State | None = None

    @classmethod
    def beginning(cls, options: Options) -> TaskProgress:
        """Each task starts again at the initial learning rate."""
        return cls(Plateau(options.lr, options.lr_min, options.lr_factor, options.lr_patience), lr=options.lr)

    def state_dict(self) -> State:
        """Plain values and tensors only."""
        return vars(self) | {"schedule": asdict(self.schedule)}

    @classmethod
    def from_state_dict(cls, state: State) -> TaskProgress:
        """The progress that `state_dict` described."""
        return cls(**state | {"schedule": Plateau(**state["schedule"])})

    def arrive(self, method: Method, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state at an epoch boundary."""
        self.weights = method.weights()
        self.optimizer, self.method = copy.deepcopy(optimizer.state_dict()), method.state_dict()

    def return_to_boundary(self, method: Method, optimizer: torch.optim.Optimizer) -> None:
        """Undo what happened since."""
        method.load_state_dict(self.method)
        method.load_weights(self.weights)
        optimizer.load_state_dict(self.optimizer)


@dataclass(frozen=True)
class Epoch:
    """One line of epochs.jsonl: losses are means over images, accuracies percent."""

    task: int
    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float | None
    valid_loss: float | None
    valid_accuracy: float | None
    seconds: float
