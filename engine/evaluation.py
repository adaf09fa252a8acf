"""What a network has learned: loss and accuracy on a split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn import functional as F

from engine.distributed import added, shared
from engine.method import Method
from engine.task import Split, batches
from gradproj import normalization


@contextmanager
def network_for(t: int, method: Method, statistics: Sequence[normalization.Statistics]) -> Iterator[nn.Module]:
    """The network as a method tests it on task t, in eval mode.

    Args:
        t: the task.
        method: with the model.
        statistics: by task, BatchNorm's to test with; empty where those of the test batch are used.
    """
    fixed = normalization.fixed_statistics(method.model, statistics[t]) if statistics else nullcontext()
    with fixed, method.testing(t):
        yield method.model.eval()


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
    n = len(split.labels)
    loss, correct = found = torch.zeros(2, dtype=torch.float64, device=split.labels.device)
    for start, stop in shared(batches(n, batch_size)):
        labels = split.labels[start:stop]
        logits = model(split.images[start:stop], t)
        loss += F.cross_entropy(logits, labels, reduction="sum")
        correct += (logits.argmax(1) == labels).sum()
    loss_sum, n_correct = added(found).tolist()
    return loss_sum / n, 100 * n_correct / n
