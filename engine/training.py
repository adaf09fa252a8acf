"""Learning one task: epochs, schedule, best weights; and measuring what was learned."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.interrupts import deferred
from engine.method import Method
from engine.options import Options
from engine.seeds import derived_seed, generator
from engine.steps import EagerSteps, make_steps
from engine.task import Split, Task, batches
from gradproj.errors import DivergenceError, InputError

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
    """How far a task has been learned, at the last epoch boundary: all that is needed to go on from there.

    Attributes:
        schedule: the learning rate to come.
        epoch: epochs done.
        start, weights, best: the model's state when the task began, at the boundary, and at the best validation loss.
        optimizer, method: their states at the boundary.
    """

    schedule: Plateau
    epoch: int = 0
    start: dict[str, Tensor] | None = None
    weights: dict[str, Tensor] | None = None
    best: dict[str, Tensor] | None = None
    optimizer: State | None = None
    method: State | None = None

    def state_dict(self) -> State:
        """Plain values and tensors only."""
        return vars(self) | {"schedule": asdict(self.schedule)}

    @classmethod
    def from_state_dict(cls, state: State) -> TaskProgress:
        """The progress that `state_dict` described."""
        return cls(**state | {"schedule": Plateau(**state["schedule"])})

    def arrive(self, method: Method, optimizer: torch.optim.Optimizer) -> None:
        """Keep the state at an epoch boundary."""
        self.weights = {name: value.clone() for name, value in method.model.state_dict().items()}
        self.optimizer, self.method = copy.deepcopy(optimizer.state_dict()), method.state_dict()


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


def start_task(options: Options) -> TaskProgress:
    """Each task starts again at the initial learning rate."""
    return TaskProgress(Plateau(options.lr, options.lr_min, options.lr_factor, options.lr_patience))


def train_task(
    method: Method,
    t: int,
    task: Task,
    options: Options,
    progress: TaskProgress,
    on_epoch: Callable[[Epoch], None],
) -> None:
    """Learn task t; with the plateau schedule the weights of the best validation loss are left in the model.

    Args:
        method: says how; it holds the model.
        task: its tensors, on the model's device.
        options: n_epochs, batch sizes, learning rate and schedule.
        progress: from `start_task`, or where an interrupted run left off; kept up to date at every epoch boundary.
        on_epoch: called at every epoch boundary with the epoch's numbers.
    Raises:
        InputError: the plateau schedule without validation images.
        DivergenceError: a loss is infinite or NaN; `progress` is that of the boundary before.
    """
    model, schedule = method.model, progress.schedule
    plateau = options.schedule == "plateau"
    if plateau and not len(task.valid.labels):
        raise InputError(
            f"schedule is plateau, but {task.name} has no validation images; hold some out or use constant"
        )
    optimizer = torch.optim.SGD(method.parameters(t), lr=schedule.lr, momentum=options.momentum)
    if progress.optimizer is not None:
        optimizer.load_state_dict(progress.optimizer)
    else:
        with deferred():
            progress.arrive(method, optimizer)
            progress.start = progress.weights
    steps = make_steps(method, optimizer, t, task, options)
    while progress.epoch < options.n_epochs and not (plateau and schedule.finished):
        began, lr, epoch = time.perf_counter(), schedule.lr, progress.epoch
        method.lr = lr
        order = seeded_order(method, t, epoch, task.train.labels)
        train_loss = steps.epoch(order, lr)
        measure = partial(evaluate, model, t, batch_size=options.batch_size_test)
        valid_loss, valid_accuracy = measure(task.valid) if len(task.valid.labels) else (None, None)
        train_accuracy = measure(task.train)[1] if options.eval_train else None
        # Losses are of the weights before each step: the validation loss sees the last step's, if there is one.
        if not math.isfinite(train_loss + (valid_loss or 0)) or (valid_loss is None and not has_finite_weights(model)):
            raise DivergenceError(find_divergence(method, optimizer, t, task, options, progress))
        with deferred():
            progress.arrive(method, optimizer)
            if plateau and schedule.step(valid_loss):
                progress.best = progress.weights
            progress.epoch += 1
            seconds = time.perf_counter() - began
            on_epoch(Epoch(t, epoch + 1, lr, train_loss, train_accuracy, valid_loss, valid_accuracy, seconds))
    if progress.best is not None:
        model.load_state_dict(progress.best)


def seeded_order(method: Method, t: int, epoch: int, labels: Tensor) -> Tensor:
    """Seed an epoch's random choices by its place alone, so that a resumed run makes the same; returns its order."""
    seed = method.options.seed
    torch.manual_seed(derived_seed(seed, "train", t, epoch))
    return method.order(labels, generator(seed, "order", t, epoch))


def has_finite_weights(model: nn.Module) -> bool:
    """Whether all of a model's parameters are finite."""
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())


def find_divergence(
    method: Method, optimizer: torch.optim.Optimizer, t: int, task: Task, options: Options, progress: TaskProgress
) -> str:
    """Replay the epoch after `progress` one step at a time; says where the numbers stopped being finite.

    Training itself watches only the epoch's mean loss, so that no step waits for the device.
    """
    model, lr = method.model, progress.schedule.lr
    model.load_state_dict(progress.weights)
    optimizer.load_state_dict(progress.optimizer)
    method.load_state_dict(progress.method)
    steps = EagerSteps(method, optimizer, t, task.train, options)
    first: list[str] = []  # what went first, of the values that a step makes
    count = 0

    def watch(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if not first and isinstance(output, Tensor) and not output.isfinite().all():
            first.append(f"the outputs of layer {name}")

    def step(images: Tensor, labels: Tensor) -> Tensor:
        nonlocal count
        if first:
            return torch.zeros((), device=images.device)
        count += 1
        loss = steps.step(images, labels)
        if not first:
            first.extend(f"weights {name}" for name, p in model.named_parameters() if not p.isfinite().all())
        if not first and not loss.isfinite():
            first.append("the loss")
        return loss

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(partial(watch, name)))
        steps.walk(seeded_order(method, t, progress.epoch, task.train.labels), step)
    where = f"step {count}, {first[0]} went first" if first else "though not when taken one step at a time"
    place = f"task {t + 1}, epoch {progress.epoch + 1}, {where}"
    return f"the loss is no longer finite: {place}; lr was {lr:g}: try a lower one"


@torch.no_grad()
def evaluate(model: nn.Module, t: int, split: Split, batch_size: int) -> tuple[float, float]:
    """Mean loss and accuracy (percent) on a split of task t, in eval mode and in the split's own order.

    A split of joined tasks (engine.task.join) is measured task by task.
    """
    if split.labels.ndim == 2:
        parts = [(j, split.of_task(j)) for j in split.labels[:, 1].unique().tolist()]
        results = [(len(part.labels), *evaluate(model, j, part, batch_size)) for j, part in parts]
        n = len(split.labels)
        return sum(m * loss for m, loss, _ in results) / n, sum(m * accuracy for m, _, accuracy in results) / n
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
