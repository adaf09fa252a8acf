"""What the engine learns from: tasks as tensors, and a benchmark as a sequence of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Split(NamedTuple):
    """Images and labels of one part of a task, on the device that trains."""

    images: Tensor  # (n, ...) float, normalised
    labels: Tensor  # (n,) int64, in [0, n_classes)

    def to(self, device: torch.device | str) -> Split:
        """The same split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def of_task(self, j: int) -> Split:
        """Of joined tasks (see `join`), the part of task j, with plain labels."""
        chosen = self.labels[:, 1] == j
        return Split(self.images[chosen], self.labels[chosen, 0])


PART_WORDS = {"train": "training", "valid": "validation", "test": "test"}
PARTS = tuple(PART_WORDS)


@dataclass(frozen=True)
class Task:
    """One task of a benchmark; `valid` drives the learning-rate schedule, `test` drives nothing.

    Attributes:
        classes: their names or numbers in the order of the outputs; 0 to n_classes - 1 where not given.
    """

    name: str
    n_classes: int
    train: Split
    valid: Split
    test: Split
    classes: Sequence[str | int] | None = None

    @property
    def held_out(self) -> HeldOut:
        """The parts that are measured again after later tasks."""
        return HeldOut(self.valid, self.test)


class HeldOut(NamedTuple):
    """What of a task is not learned from."""

    valid: Split
    test: Split


class LazyTasks(Sequence[Task]):
    """A sequence of tasks built when asked for, so that only the task at hand takes up memory.

    Args:
        n_tasks: length of the sequence.
        build: makes task t; must depend on t alone, so that asking twice gives the same task.
        build_held_out: makes its held-out parts alone, where that is quicker: after each task those of all earlier ones
            are asked for.
        sizes: by task, how many images each of its parts has, where that is known before it is built.
    """

    def __init__(
        self,
        n_tasks: int,
        build: Callable[[int], Task],
        build_held_out: Callable[[int], HeldOut] | None = None,
        sizes: Sequence[Mapping[str, int]] = (),
    ) -> None:
        self._n_tasks, self._build, self.sizes = n_tasks, build, sizes
        self._build_held_out = build_held_out or (lambda t: build(t).held_out)

    def __len__(self) -> int:
        return self._n_tasks

    def __getitem__(self, t: int) -> Task:  # type: ignore[override]
        return self._build(self._checked(t))

    def held_out(self, t: int) -> HeldOut:
        """The held-out parts of task t."""
        return self._build_held_out(self._checked(t))

    def _checked(self, t: int) -> int:
        if not 0 <= t < self._n_tasks:
            raise IndexError(f"task {t} of {self._n_tasks}")
        return t


def join(tasks: Sequence[Task], n_tasks: int) -> Task:
    """The first tasks as one; its labels are (n, 2): the label within its task, and the task.

    Built task by task, so that besides the joined images only one task takes up memory.
    """
    sizes = [
        {part: len(getattr(task, part).labels) for part in PARTS} for task in map(tasks.__getitem__, range(n_tasks))
    ]
    joined: dict[str, Split] = {}
    n_classes = 0
    for t in range(n_tasks):
        task = tasks[t]
        n_classes = max(n_classes, task.n_classes)
        for part in PARTS:
            images, labels = getattr(task, part)
            if t == 0:
                n = sum(size[part] for size in sizes)
                joined[part] = Split(images.new_empty(n, *images.shape[1:]), labels.new_empty(n, 2))
            start = sum(size[part] for size in sizes[:t])
            rows = slice(start, start + len(labels))
            joined[part].images[rows] = images
            joined[part].labels[rows] = torch.stack([labels, torch.full_like(labels, t)], dim=1)
    return Task("all tasks", n_classes, **joined)


@dataclass(frozen=True)
class Benchmark:
    """The tasks of one benchmark and where their images came from.

    Attributes:
        name: pmnist, cifar100, cifar100_superclass, five_datasets or miniimagenet; or your own.
        data: "real" or "embedded".
        tasks: in the order they are learned; a list, or LazyTasks.
        sources: per raw data set, its checksum and image counts, copied into summary.json.
        notes: what a reader of the numbers has to know (a set that is incomplete or left out), shown in every output.
    """

    name: str
    data: str
    tasks: Sequence[Task]
    sources: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def batches(n: int, batch_size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each batch of n images; the last may be smaller, but never a single image.

    One image has no batch statistics (BatchNorm1d refuses it), so it joins the batch before it.
    """
    start = 0
    while start < n:
        stop = min(start + batch_size, n)
        if n - stop == 1:
            stop = n
        yield start, stop
        start = stop
