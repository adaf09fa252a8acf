"""Telling a memory's user what can move old tasks' outputs: before training, at its steps, and afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from gradproj.concerns import what_can_forget, what_steps_past
from gradproj.errors import warn_caller
from gradproj.inspection import Memory
from gradproj.optimizers import watched_steps
from gradproj.projection import LayerProjector
from gradproj.snapshot import Snapshot
from gradproj.verification import what_moved


class Watcher:
    """Warns of what can forget, each thing once.

    Attributes:
        snapshot: the model as it was last remembered; None before.
        said: what was warned of.
        suspects: names of what was said to be moved by something, so that finding it moved is no news.
        projected: ids of optimisers whose updates are projected.
    """

    def __init__(self) -> None:
        self.snapshot: Snapshot | None = None
        self.said: set[str] = set()
        self.suspects: set[str] = set()
        self.projected: set[int] = set()

    def remember(self, memory: Memory) -> None:
        """From now on a memory's model is compared with what it is now."""
        self.snapshot = Snapshot.of(memory.model, memory.layers.values())

    def say(self, text: str, category: type[UserWarning] = UserWarning) -> None:
        """Warn the caller of the library, once of each thing."""
        if text not in self.said:
            self.said.add(text)
            warn_caller(text, category)

    def say_what_can_forget(self, memory: Memory) -> None:
        """Warn of what learns without protection, as things are now."""
        for concern in what_can_forget(memory.model, memory.exclude, memory.include, memory.unprotected):
            self.say(concern)

    def say_leak(self, leak: str) -> None:
        """Warn of a phrase that says what may let old tasks be forgotten."""
        self.say(f"{leak}: old tasks may be forgotten through it")

    def say_leaks(self, leaks: Iterable[tuple[str, str]]) -> None:
        """Warn of what may let old tasks be forgotten: names of layers, parameters or buffers, each with a phrase."""
        for name, leak in leaks:
            self.suspects.add(name)
            self.say_leak(leak)

    def say_of_the_first_pass(self, memory: Memory, leaks: Iterable[tuple[str, str]]) -> None:
        """Warn of what the first forward pass under protection showed."""
        self.say_leaks(leaks)
        self.say_what_can_forget(memory)  # again: statistics move only of modules in training mode, as they are now

    def say_what_moved(self, memory: Memory, projectors: Mapping[str, LayerProjector]) -> None:
        """Warn of what moved although its gradients were projected, unless what may move it was named before.

        Args:
            memory: whose bases.
            projectors: that make gradients orthogonal to them.
        """
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return  # while a CUDA graph is recorded no number is known
        if self.snapshot is not None:
            self.say_what_can_forget(memory)  # which may have been unfrozen, or added, since
            layers = [project.layer for name, project in projectors.items() if name not in self.suspects]
            moved = [pair for pair in what_moved(memory, layers, self.snapshot) if pair[0] not in self.suspects]
            self.say_leaks([(name, f"{what} since task {memory.n_updates}") for name, what in moved])

    @contextmanager
    def steps(self, memory: Memory, projectors: Mapping[str, LayerProjector]) -> Iterator[None]:
        """Within this context optimisers' steps are counted, the first of each is looked at, and what 1, 10, 100 … of
        them have moved.

        Args:
            memory: whose layers they train.
            projectors: that gradients must have gone through, and that make them orthogonal to the bases.
        """
        layers = memory.layers.values() if any(memory.columns.values()) else ()
        parameters = {id(p) for layer in layers for p in layer.parameters if p is not None}
        taken = 0

        def count() -> None:
            nonlocal taken
            if taken and taken == 10 ** (len(str(taken)) - 1):
                self.say_what_moved(memory, projectors)
            taken += 1
            if self.snapshot is not None:
                self.snapshot.steps += 1

        def look(optimizer: torch.optim.Optimizer, has_closure: bool) -> None:
            if id(optimizer) not in self.projected:
                for concern in what_steps_past(optimizer, projectors.values(), not has_closure):
                    self.suspects |= projectors.keys()
                    self.say(concern)

        self.suspects = set()
        with watched_steps(parameters, look, count):
            yield
