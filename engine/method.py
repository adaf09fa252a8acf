"""What a method is: the few moments of training at which methods differ."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.options import Options
from engine.task import Task
from gradproj.memory import GradientProjectionMemory
from gradproj.projection import LayerProjector
from gradproj.representation import Layer, find_layers


class Method:
    """A way to learn tasks one after another. Every moment has a default: plain training.

    Args:
        model: called as `model(images, task)`; the heads of a multi-head model are in `model.heads`.
        options: the run's hyperparameters.
    Raises:
        InputError: the method cannot be used with this model or these options.
    """

    name: ClassVar[str]
    memory: GradientProjectionMemory | None = None
    projectors: Mapping[str, LayerProjector] = MappingProxyType({})  # by layer name, while learning
    learning_rate: ClassVar[float | None] = None  # what it starts tasks with where the scripts' own does not suit
    joint: ClassVar[bool] = False  # learns all tasks at once, joined into one (engine.task.join), instead of in turn

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model, self.options = model, options
        self.lr = options.lr  # of the epoch at hand

    @property
    def has_plain_step(self) -> bool:
        """Whether a training step is SGD on the loss, with nothing of the method's own but projected gradients."""
        moments = ("loss", "after_backward", "after_step")
        return all(getattr(type(self), moment) is getattr(Method, moment) for moment in moments)

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        """Surrounds the training of task t; entered anew when a run is continued within a task."""
        yield

    @contextmanager
    def testing(self, t: int) -> Iterator[None]:
        """Surrounds the testing of task t, between tasks."""
        yield

    def parameters(self, t: int) -> list[nn.Parameter]:
        """What training on task t moves; asked for inside `learning`."""
        return trainable_parameters(self.model, [t])

    def order(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The order of an epoch's images; each batch takes the next `options.batch_size_train` of them."""
        return torch.randperm(len(labels), generator=generator)

    def loss(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        """The loss of a batch, to be minimised."""
        return F.cross_entropy(self.model(images, t), labels)

    def after_backward(self, t: int) -> None:
        """Gradients are there, the optimiser has not moved yet."""

    def after_step(self, t: int) -> None:
        """The optimiser has moved."""

    def after_task(self, t: int, task: Task) -> None:
        """Task t is learned, its best weights are in the model."""

    def memory_floats(self) -> int:
        """How many numbers the method keeps of the past besides the network itself."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What the method must save to go on: tensors and plain values only, none of which is changed in place."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""


def task_heads(model: nn.Module) -> list[str]:
    """The names of the modules that belong to single tasks: what no method protects."""
    return ["heads"] if hasattr(model, "heads") else []


def shared_layers(model: nn.Module) -> dict[str, Layer]:
    """The layers that all tasks share, by name."""
    return find_layers(model, exclude=task_heads(model))


def trainable_parameters(model: nn.Module, heads: Collection[int]) -> list[nn.Parameter]:
    """All shared parameters that are not frozen and, of `model.heads`, if any, those of some tasks."""
    prefixes = tuple(f"heads.{t}." for t in heads)
    return [
        p
        for name, p in model.named_parameters()
        if p.requires_grad and (not name.startswith("heads.") or name.startswith(prefixes))
    ]
