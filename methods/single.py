"""One network for each task: nothing is forgotten and nothing is shared, the yardstick of forward transfer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from engine.method import Method
from engine.options import Options
from engine.seeds import generator
from engine.task import Task

Weights = dict[str, Tensor]


class Single(Method):
    """Plain SGD on each task from a fresh network; task j is tested with network j.

    A method's forward transfer on task j is its accuracy there right after learning it, minus this one's.

    Task 0 starts from the model as given. A later task's network has the entries of each trained parameter in a random
    order: initialisers draw them independently, so this is another draw, whatever the distribution; but for one that
    draws whole matrices, such as an orthogonal one. Buffers and frozen parameters are everywhere as given.

    Stores one network for each task; `memory_floats` counts all but the last.
    """

    name, title, place = "single", "Single", 3
    plain_step = True
    task_identity = True
    one_network = False
    state = ("initial", "networks")

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.initial = copy(model)
        self.networks: list[Weights] = []

    def fresh(self, t: int) -> Weights:
        """The network that task t starts from."""
        if t == 0:
            return self.initial
        random = generator(self.options.seed, "network", t)
        kept = {id(p) for name, p in self.model.named_parameters() if name in self.given_frozen}
        drawn = {name for name, p in self.model.named_parameters(remove_duplicate=False) if id(p) not in kept}

        def redrawn(value: Tensor) -> Tensor:
            return value.flatten()[torch.randperm(value.numel(), generator=random).to(value.device)].view(value.shape)

        return {name: redrawn(value) if name in drawn else value for name, value in self.initial.items()}

    def before_task(self, t: int, task: Task) -> None:
        """Begin anew with each task."""
        self.model.load_state_dict(self.fresh(t))

    @contextmanager
    def testing(self, t: int) -> Iterator[None]:
        """Test task t with its own network."""
        current = copy(self.model)
        self.model.load_state_dict(self.networks[t])
        try:
            yield
        finally:
            self.model.load_state_dict(current)

    def after_task(self, t: int, task: Task) -> None:
        """Keep the network."""
        self.networks = [*self.networks[:t], copy(self.model)]

    def memory_floats(self) -> int:
        """The networks of all tasks but the last, which is in the model."""
        return sum(value.numel() for weights in self.networks[:-1] for value in weights.values())


def copy(model: nn.Module) -> Weights:
    """A model's state, apart from it."""
    return {name: value.clone() for name, value in model.state_dict().items()}
