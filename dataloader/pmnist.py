"""Permuted MNIST: every task is MNIST with its pixels rearranged in one fixed, random way (paper Section 6)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dataloader.sets import Part, open_sets
from dataloader.splits import PERMUTATION, check_common, limit_per_class, n_held_out, normalise, task_generator
from engine.task import Benchmark, HeldOut, LazyTasks, Split, Task

MEAN, STD = (0.1307,), (0.3081,)


def load(
    *,
    seed: int,
    n_tasks: int = 10,
    pc_valid: float = 0.1,
    n_train: int | None = None,
    data: str = "real",
    data_dir: str | Path = "data",
    device: torch.device | str = "cpu",
) -> Benchmark:
    """The permuted-MNIST benchmark: one head, ten digits, every task under its own permutation, the first too.

    Args:
        seed: with the task's number decides its permutation; nothing else does.
        n_tasks: 1 or more; there is no end of permutations, the paper uses 10.
        pc_valid: fraction of the training set held out, from its start; validation drives nothing here.
        n_train: training images per class to use before the hold-out; None for all.
        data: "real" or "embedded".
        data_dir: where the array cache is, or goes.
        device: where the tasks' tensors live.
    Returns:
        tasks with images (n, 784) float32 and labels 0 to 9.
    Raises:
        InputError: an argument is out of range.
        DataError: images are missing or damaged.
    """
    check_common(seed=seed, n_tasks=n_tasks, most=None, pc_valid=pc_valid, n_train=n_train)
    opened = open_sets(["mnist"], data, data_dir)
    mnist = opened.sets["mnist"]
    notes = opened.notes
    order = np.arange(len(mnist.train.labels))
    if _sorted_by_class(mnist.train.labels):
        # The first tenth of a sorted file would be all zeros, and no zeros would be left to learn from.
        order = mnist.train.order
        notes += ("mnist: training images are stored sorted by class, so the held-out part is not the published one",)
    order = order[limit_per_class(mnist.train.labels[order], n_train)]
    train, test = _flat(mnist.train, order, device), _flat(mnist.test, mnist.test.order, device)
    n_valid = n_held_out(len(order), pc_valid)

    valid, train = (Split(train.images[rows], train.labels[rows]) for rows in (slice(n_valid), slice(n_valid, None)))

    def permuted(split: Split, t: int) -> Split:
        permutation = torch.from_numpy(task_generator(seed, t, PERMUTATION).permutation(28 * 28)).to(device)
        return Split(split.images.index_select(1, permutation), split.labels)

    def held_out(t: int) -> HeldOut:
        return HeldOut(permuted(valid, t), permuted(test, t))

    def build(t: int) -> Task:
        return Task(f"permutation {t}", 10, permuted(train, t), *held_out(t))

    return Benchmark("pmnist", data, LazyTasks(n_tasks, build, held_out), opened.sources, notes)


def _sorted_by_class(labels: np.ndarray) -> bool:
    return bool(labels[0] < labels[-1] and (np.diff(labels) >= 0).all())


def _flat(part: Part, rows: np.ndarray, device: torch.device | str) -> Split:
    images = normalise(part.images[rows], MEAN, STD).flatten(1)  # (n, 784)
    return Split(images, torch.from_numpy(part.labels[rows])).to(device)
