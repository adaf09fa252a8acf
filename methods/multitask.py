"""Joint training on all tasks at once: what the others, who see one task at a time, can hope for at most."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.method import Method
from engine.task import Task
from methods.parts.replay import has_batch_statistics, mixed_loss


class Multitask(Method):
    """SGD on the union of all tasks' training sets, each image through the head of its task.

    loss = 1/|B| Σ_{(x, y, j) ∈ B} CE(f_j(x), y). The epochs and the schedule are those of one task, on the union; its
    validation loss drives the plateau. Only the last row of the accuracy matrix exists, and no backward transfer.

    A batch mixes tasks, unless the network normalises by the statistics of the batch: then each batch is of one task,
    in random turns, since a test batch is of one task too. The last batches of an epoch mix what is left over.

    Stores every task's training images, which is what `memory_floats` counts.
    """

    name, title, place = "multitask", "Multitask", 2
    joint = True
    state = ("floats",)
    floats = 0

    def before_task(self, t: int, task: Task) -> None:
        """Take note of the size of the union."""
        self.floats = task.train.images.numel()

    def parameters(self, t: int) -> list[nn.Parameter]:
        """Shared parameters and the heads of all tasks."""
        return self.trainable(range(t + 1))

    def order(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """All images shuffled; or shuffled batches of one task each, then what is left over of each task.

        An image left over alone has no batch statistics and sits this epoch out.
        """
        if not has_batch_statistics(self.model):
            return super().order(labels, generator)
        tasks, size = labels[:, 1].cpu(), self.options.batch_size_train
        full, partial = [], []
        for j in tasks.unique():
            mine = (tasks == j).nonzero()[:, 0]
            for batch in mine[torch.randperm(len(mine), generator=generator)].split(size):
                if len(batch) == size:
                    full.append(batch)
                elif len(batch) > 1:
                    partial.append(batch)
        shuffled = [parts[i] for parts in (full, partial) for i in torch.randperm(len(parts), generator=generator)]
        return torch.cat(shuffled)

    def loss(self, images: Tensor, labels: Tensor, t: int) -> Tensor:
        """The mean loss over a batch of joined tasks, whose labels are (label, task)."""
        return mixed_loss(self, images, labels[:, 0], labels[:, 1].cpu())

    def memory_floats(self) -> int:
        return self.floats
