"""A task cut from some classes of a data set, as three of the benchmarks need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dataloader.sets import OpenSet, Part
from dataloader.splits import holdout, limit_per_class
from engine.task import Split, Task


def class_task(
    opened: OpenSet,
    classes: Sequence[int] | np.ndarray,
    to_tensor: Callable[[np.ndarray], Tensor],
    *,
    name: str,
    pc_valid: float,
    generator: np.random.Generator,
    n_train: int | None,
    device: torch.device | str,
) -> Task:
    """A task made of some classes of a set, relabelled 0, 1, … in the order of `classes`.

    Args:
        opened: the whole set.
        classes: (c,) class numbers of the set.
        to_tensor: (n, h, w[, 3]) uint8 array to (n, 3, 32, 32) float32 tensor.
        name: of the task.
        pc_valid: fraction of the training images to hold out.
        generator: draws the validation images.
        n_train: training images per class to use before the hold-out; None for all.
        device: where the tensors go.
    """
    new_label = np.full(max(classes) + 1, -1)
    new_label[np.asarray(classes)] = np.arange(len(classes))

    def split(part: Part, rows: np.ndarray) -> Split:
        return Split(to_tensor(part.images[rows]), torch.from_numpy(new_label[part.labels[rows]])).to(device)

    rows = opened.train.rows_of(classes)
    rows = rows[limit_per_class(opened.train.labels[rows], n_train)]
    train, valid = holdout(len(rows), pc_valid, generator)
    return Task(
        name=name,
        n_classes=len(classes),
        train=split(opened.train, rows[train]),
        valid=split(opened.train, rows[valid]),
        test=split(opened.test, opened.test.rows_of(classes)),
    )
