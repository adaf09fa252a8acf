"""From labelled bytes to the tensors of a task: which images, in which order, normalised how; and the task of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dataloader.sets import OpenSet, Part
from engine.task import Split, Task
from gradproj.errors import InputError

# What a generator is for is part of its seed, so that two choices of one task never share their numbers.
PERMUTATION, VALIDATION, CLASS_ORDER, TEST, ORDER = range(5)


def task_generator(seed: int, t: int, purpose: int) -> np.random.Generator:
    """Random numbers that depend on (seed, t, purpose) alone, so tasks can be built in any order."""
    return np.random.default_rng(np.random.SeedSequence([seed, t, purpose]))


def normalise(images: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bytes to floats: (pixel / 255 - mean) / std, per channel.

    Args:
        images: (n, h, w) or (n, h, w, c) uint8.
        mean, std: c numbers (one for grey images) on the scale where white is 1.
    Returns:
        (n, c, h, w) float32 on the CPU, c = 1 for grey images.
    """
    pixels = torch.from_numpy(np.array(images))  # a copy: memory-mapped arrays are read-only
    pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)  # (n, c, h, w)
    scaled = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return scaled.sub_(_per_channel(mean)).div_(_per_channel(std))


def _per_channel(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


def limit_per_class(labels: np.ndarray, n_train: int | None) -> np.ndarray:
    """Positions of the first `n_train` images of every class, ascending; all positions if `n_train` is None.

    Args:
        labels: (n,) integers.
        n_train: images to keep per class; a class with fewer keeps them all.
    """
    if n_train is None:
        return np.arange(len(labels))
    return np.sort(np.concatenate([np.flatnonzero(labels == c)[:n_train] for c in np.unique(labels)]))


def n_held_out(n: int, fraction: float) -> int:
    """int(fraction * n), but at least one image when anything is to be held out and two are there to share."""
    return max(int(fraction * n), 1 if fraction > 0 and n > 1 else 0)


def holdout(n: int, fraction: float, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split n positions at random into (train, valid), both ascending.

    Ascending keeps the order of what is split: of the published sets, that of `content_order`, which looks random.
    """
    shuffled = generator.permutation(n)
    n_valid = n_held_out(n, fraction)
    return np.sort(shuffled[n_valid:]), np.sort(shuffled[:n_valid])


def check_common(
    *, seed: int, n_tasks: int, most: int | None, pc_valid: float, n_train: int | None, protocol: str | None = None
) -> None:
    """Refuse what no benchmark can use.

    Args:
        most: the largest number of tasks there is; None where there is no end of them.
    Raises:
        InputError: one line, what was given and what would be right.
    """
    if seed < 0:
        raise InputError(f"seed is {seed}; it must be 0 or more")
    if n_tasks < 1 or (most is not None and n_tasks > most):
        raise InputError(f"n_tasks is {n_tasks}; it must be {'at least 1' if most is None else f'1 to {most}'}")
    if not 0 <= pc_valid < 1:
        raise InputError(f"pc_valid is {pc_valid}; it must be a fraction from 0 up to, not including, 1")
    if n_train is not None and n_train < 1:
        raise InputError(f"n_train is {n_train}; it must be at least 1 image per class")
    if protocol not in (None, "paper", "released"):
        raise InputError(f"unknown protocol {protocol!r}; known are paper, released")


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
        classes=tuple(map(int, classes)),
    )
