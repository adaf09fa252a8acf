"""A benchmark's tasks as a run sees them: checked, the same each time they are built, on the run's device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from engine import fingerprint
from engine.checks import cannot_take, check_alike, check_benchmark, check_fits, check_tensors
from engine.method import Method
from engine.task import PARTS, Benchmark, HeldOut, LazyTasks, Split, Task
from engine.usage import Usage, on_trial
from gradproj.errors import InputError

KEPT_BYTES = 2**28  # of held-out images that stay in memory from one test to the next; all others are built again


class RunTasks(Sequence[Task]):
    """The tasks of a run: one at a time in memory, and the held-out images of a few.

    Those of a list are all checked when this is made; of others the first is, and each other one when it is first asked
    for. What is built a second time must be the same again.

    Args:
        benchmark: whose tasks they are.
        method: with the network and the options.
        device: where their tensors go.
    Raises:
        InputError: tasks, network and method do not fit each other.

    Attributes:
        records: by task, what `engine.fingerprint.of_task` tells of those seen so far.
    """

    def __init__(self, benchmark: Benchmark, method: Method, device: torch.device) -> None:
        check_benchmark(benchmark, method)
        self.tasks, self.method, self.device = benchmark.tasks, method, device
        self.in_memory = isinstance(self.tasks, (list, tuple))
        self.records: dict[int, dict[str, Any]] = {}
        self._usage = Usage(method)
        self._first: tuple[str, Tensor] | None = None  # the first task's name and one of its images
        self._newest: tuple[int, Task] | None = None
        self._kept: dict[int, HeldOut] = {}
        self._room = KEPT_BYTES
        with on_trial(method.model) as lent:
            for t in range(len(self)) if self.in_memory or method.joint else [0]:
                self._newest = None
                self._newest = t, self._met(t, lent)
            for t in range(len(self)):  # what later tasks use, where the first one's images tell
                if t not in self._usage.used:
                    with suppress(Exception):
                        self._usage.ask(lent, t, self._newest[1].train.images[:2])
        self._usage.check()

    def __len__(self) -> int:
        return self.method.options.n_tasks

    def __getitem__(self, t: int) -> Task:  # type: ignore[override]
        if self._newest is None or self._newest[0] != t:
            self._newest = None  # before another one takes up memory
            if t in self.records:
                self._newest = t, self._built(t)
            else:
                with on_trial(self.method.model) as lent:
                    self._newest = t, self._met(t, lent)
                self._usage.check()
        return self._newest[1]

    def held_out(self, t: int) -> HeldOut:
        """The validation and test images of a task: those kept in memory, or built again without the others."""
        if t in self._kept:
            return self._kept[t]
        if self.in_memory or t not in self.records or (self._newest is not None and self._newest[0] == t):
            parts = self[t].held_out
        else:
            parts = self.tasks.held_out(t) if isinstance(self.tasks, LazyTasks) else self.tasks[t].held_out
            parts = HeldOut(*(part.to(self.device) for part in parts))
            quick = {name: fingerprint.of_split(part) for name, part in parts._asdict().items()}
            self._check_same(t, quick)
        if not self.in_memory:
            self._keep(t, parts)
        return parts

    def meet_all(self) -> None:
        """See those of the tasks that have not been seen."""
        for t in range(len(self)):
            if t not in self.records:
                _ = self[t]

    @property
    def known(self) -> list[dict[str, Any]]:
        """The records of the first tasks, as far as all have been seen."""
        known = []
        while len(known) in self.records:
            known.append(self.records[len(known)])
        return known

    def difference(self, known: Sequence[Mapping[str, Any]]) -> str:
        """What differs between the first tasks and those that an earlier process knew; empty if nothing does."""
        for t, record in enumerate(known):
            if t not in self.records:
                _ = self[t]
            if different := fingerprint.differences(record, self.records[t]):
                return f"task {t + 1}, {record['name']}: {different}"
        return ""

    def kind(self, t: int) -> tuple[str, str]:
        """What one image of a task is: its shape and its dtype."""
        shape, dtype, *_ = self.records[t]["train"]
        return shape.partition("x")[2], dtype

    def _met(self, t: int, lent: nn.Module) -> Task:
        """A task that is seen for the first time, checked."""
        task, options = self.tasks[t], self.method.options
        check_tensors(task, t, options)
        task = self._moved(task)
        image = task.train.images[0].clone()
        self._first = self._first or (task.name, image)
        check_alike(self.method, self._first, (task.name, image))
        check_fits(lent, task, t, options, getattr(self.tasks, "sizes", ())[: len(self)])
        try:
            self._usage.ask(lent, t, task.train.images[:2])
        except InputError:
            raise
        except Exception as error:  # in training mode
            raise InputError(cannot_take(lent, task, t, task.train.images, error)) from error
        self.records[t] = fingerprint.of_task(task)
        return task

    def _built(self, t: int) -> Task:
        """A task that was seen before."""
        task = self._moved(self.tasks[t])
        if not self.in_memory:
            self._check_same(t, fingerprint.of_task(task))
        return task

    def _moved(self, task: Task) -> Task:
        """On the run's device, and without a history of gradients."""
        parts = {part: getattr(task, part).to(self.device) for part in PARTS}
        return replace(task, **{part: Split(images.detach(), labels) for part, (images, labels) in parts.items()})

    def _check_same(self, t: int, record: Mapping[str, Any]) -> None:
        if different := fingerprint.differences(self.records[t], record):
            raise InputError(
                f"task {t + 1} ({self.records[t]['name']}) is another one each time it is built ({different}); what "
                "builds it must depend on its number alone"
            )

    def _keep(self, t: int, parts: HeldOut) -> None:
        size = sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part)
        if size <= self._room:
            self._room -= size
            self._kept[t] = HeldOut(*(Split(*map(_alone, part)) for part in parts))


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that keeps nothing in memory beside itself: a view would keep all that it is a part of."""
    is_view = tensor.numel() * tensor.element_size() < tensor.untyped_storage().nbytes()
    return tensor.clone() if is_view else tensor
