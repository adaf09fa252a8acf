"""Episodic memory: a few images of earlier tasks, drawn by reservoir sampling and replayed later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.method import Method
from engine.options import Options, flag
from engine.seeds import generator
from engine.task import Split, Task


@dataclass(frozen=True)
class Reservoir:
    """A uniform sample of fixed size of all images offered so far (Vitter 1985, Algorithm R).

    Attributes:
        images, labels: of the images held, on their device; None while there are none.
        tasks: (n,) the task of each, on the CPU.
        seen: images offered so far.
    """

    images: Tensor | None = None
    labels: Tensor | None = None
    tasks: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    seen: int = 0

    def __len__(self) -> int:
        return len(self.tasks)

    def offer(self, size: int, split: Split, t: int, random: torch.Generator) -> Reservoir:
        """The reservoir after each image of task t was offered once, in random order.

        The i-th image ever offered, from 0, goes to a random place in [0, i], instead of the image there; a place
        beyond the size drops it.

        Args:
            size: most images to hold.
            split: the images.
            t: their task.
            random: a CPU generator.
        """
        n = len(split.labels)
        order = torch.randperm(n, generator=random)
        number = self.seen + torch.arange(n)
        place = (torch.rand(n, generator=random, dtype=torch.float64) * (number + 1)).long()
        place = torch.where(number < size, number, place)  # until it is full, every image finds a place
        taken = place < size
        newest = dict(zip(place[taken].tolist(), order[taken].tolist(), strict=True))  # who comes last stays
        places, chosen = torch.tensor(list(newest), dtype=torch.int64), list(newest.values())
        length = min(size, self.seen + n)
        return Reservoir(
            _put(self.images, length, places, split.images[chosen]),
            _put(self.labels, length, places, split.labels[chosen]),
            _put(self.tasks, length, places, torch.full((len(chosen),), t)),
            self.seen + n,
        )

    def to(self, device: torch.device) -> Reservoir:
        """The same with its images on a device."""
        if self.images is None:
            return self
        return replace(self, images=self.images.to(device), labels=self.labels.to(device), tasks=self.tasks.cpu())

    def draw(self, n: int, of_one_task: bool, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """A uniform sample of at most n images, without replacement: images, labels and tasks (CPU).

        Args:
            n: how many.
            of_one_task: all of the task of one image drawn uniformly.
            random: a CPU generator.
        """
        among = torch.arange(len(self))
        if of_one_task:
            task = self.tasks[torch.randint(len(self), (1,), generator=random)]
            among = (self.tasks == task).nonzero()[:, 0]
        index = among[torch.randperm(len(among), generator=random)[:n]]
        if of_one_task and len(index) == 1:
            index = index.repeat(2)  # BatchNorm refuses a single image
        on_device = index.to(self.labels.device)
        return self.images[on_device], self.labels[on_device], self.tasks[index]


class Replay(Method):
    """What methods with an episodic memory share: its size, its filling, and the loss of a replayed batch.

    A task's training images pass through the reservoir once, at its end, so that the memory holds images of earlier
    tasks only, each at most once, however many epochs they were seen. `memory_images` is its size, by default so that
    it holds as many floats as the largest possible GPM, Σ d² over the protected layers: 810 images for permuted MNIST,
    1,901 for 10-split CIFAR-100, 3,625 for its superclasses, 2,924 for 5-datasets.

    Where the network normalises by the statistics of the batch, a replayed batch is of one task (a task's chance is its
    share of the memory), since a test batch is of one task too; otherwise it mixes tasks.

    Training also moves the heads of earlier tasks, by what is replayed.

    Stores the images of the memory.
    """

    flags = {
        "memory_images": flag(
            None,
            "images in the episodic memory; default as many floats as the largest possible GPM, Σ d² over its layers",
            above=0,
        ),
        "replay_batch": flag(
            None, "images drawn from the memory at each step; default as many as a training batch has", above=0
        ),
    }
    mixes_tasks = True
    state = ("reservoir", "generator")

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.largest = sum(layer.input_size**2 * layer.groups for layer in self.shared_layers().values())
        self.reservoir = Reservoir()  # its size follows from that of an image
        self.generator = generator(options.seed, "replay")

    def parameters(self, t: int) -> list[nn.Parameter]:
        """Shared parameters and the heads of the tasks so far."""
        return self.trainable(range(t + 1))

    def replayed_loss(self) -> tuple[Tensor | None, int]:
        """The mean loss over images drawn from the memory, and their number; None and 0 while it is empty."""
        if not len(self.reservoir):
            return None, 0
        n = self.options.replay_batch or self.options.batch_size_train
        drawn = self.reservoir.draw(n, has_batch_statistics(self.model), self.generator)
        return mixed_loss(self, *drawn), len(drawn[0])

    def after_task(self, t: int, task: Task) -> None:
        """Pass the task's images through the reservoir."""
        size = self.options.memory_images or max(1, round(self.largest / task.train.images[0].numel()))
        self.reservoir = self.reservoir.offer(size, task.train, t, generator(self.options.seed, "reservoir", t))

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self.reservoir = self.reservoir.to(next(self.model.parameters()).device)


def has_batch_statistics(model: nn.Module) -> bool:
    """Whether a network's outputs in training depend on the other images of the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def mixed_loss(method: Method, images: Tensor, labels: Tensor, tasks: Tensor) -> Tensor:
    """Mean cross-entropy of images of several tasks, each through the head of its own.

    Args:
        method: its model is called as `model(images, task)`, once for each task in the batch; once in all where all
            tasks share one head and no BatchNorm asks which images share a batch.
        images, labels: (n, ...) and (n,).
        tasks: (n,) the task of each image, on the CPU. Where BatchNorm needs more than one image, a task's single image
            of a batch is left out.
    """
    model = method.model
    if not method.task_modules and not has_batch_statistics(model):
        return F.cross_entropy(model(images, int(tasks[0])), labels)
    groups = [(j, (tasks == j).nonzero()[:, 0].to(labels.device)) for j in tasks.unique().tolist()]
    if has_batch_statistics(model) and len(groups) > 1:
        groups = [(j, index) for j, index in groups if len(index) > 1] or groups[:1]
    total = sum(F.cross_entropy(model(images[index], j), labels[index], reduction="sum") for j, index in groups)
    return total / sum(len(index) for _, index in groups)


def _put(old: Tensor | None, length: int, places: Tensor, new: Tensor) -> Tensor:
    """A copy of `old`, lengthened, with new rows at some places."""
    result = new.new_empty(length, *new.shape[1:])
    if old is not None:
        result[: len(old)] = old
    result[places.to(new.device)] = new
    return result
