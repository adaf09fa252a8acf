"""5-datasets: CIFAR-10, MNIST, SVHN, Fashion-MNIST and notMNIST, one after the other, all as 3x32x32 images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloader.cifar100 import MEAN as CIFAR_MEAN
from dataloader.cifar100 import STD as CIFAR_STD
from dataloader.sets import OpenSet, open_sets
from dataloader.splits import VALIDATION, check_common, class_task, normalise, task_generator
from engine.task import Benchmark, LazyTasks, Task
from gradproj.errors import InputError

# In the published order: mean and std of each set's images once they are 32x32.
STATISTICS = {
    "cifar10": (CIFAR_MEAN, CIFAR_STD),
    "mnist": ((0.1,), (0.2752,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
    "fashion_mnist": ((0.2190,), (0.3318,)),
    "notmnist": ((0.4254,), (0.4501,)),
}
DATASETS = tuple(STATISTICS)


def load(
    *,
    seed: int,
    datasets: Sequence[str] = DATASETS,
    n_tasks: int | None = None,
    pc_valid: float = 0.05,
    protocol: str = "paper",
    n_train: int | None = None,
    data: str = "real",
    data_dir: str | Path = "data",
    device: torch.device | str = "cpu",
) -> Benchmark:
    """The 5-datasets benchmark: ten classes per task, a head each.

    Args:
        seed: with the data set decides which images are held out, whatever the order of tasks.
        datasets: which sets, in which order; the published benchmark is the default.
        n_tasks: 1 to len(datasets), from the start; None for all.
        pc_valid: fraction of each task's training images held out at random.
        protocol: "paper"; or "released", which does what the authors' code does: in Fashion-MNIST's place MNIST again,
            normalised with Fashion-MNIST's mean and std, its hold-out drawn with seed 1 whatever `seed` says.
        n_train: training images per class to use before the hold-out; None for all.
        data: "real" or "embedded".
        data_dir: where the array cache is, or goes.
        device: where the tasks' tensors live.
    Returns:
        tasks with images (n, 3, 32, 32) float32 and labels 0 to 9.
    Raises:
        InputError: an argument is out of range.
        DataError: images are missing or damaged.
    """
    datasets = _checked(datasets)
    n_tasks = len(datasets) if n_tasks is None else n_tasks
    check_common(seed=seed, n_tasks=n_tasks, most=len(datasets), pc_valid=pc_valid, n_train=n_train, protocol=protocol)
    datasets = datasets[:n_tasks]
    released = protocol == "released"
    images_of = {name: "mnist" if released and name == "fashion_mnist" else name for name in datasets}
    opened = open_sets(images_of.values(), data, data_dir)

    @cache  # resizing notMNIST takes longer than all the rest of a task
    def set_at_32(name: str) -> OpenSet:
        enlarge = resize_to_32 if name == "notmnist" else pad_to_32
        return OpenSet(*(part._replace(images=enlarge(part.images)) for part in opened.sets[name]))

    def build(t: int) -> Task:
        name = datasets[t]
        return class_task(
            set_at_32(images_of[name]),
            range(10),
            lambda images: _three_channels(normalise(images, *STATISTICS[name])),
            name=name,
            pc_valid=pc_valid,
            generator=task_generator(1 if images_of[name] != name else seed, DATASETS.index(name), VALIDATION),
            n_train=n_train,
            device=device,
        )

    notes = opened.notes
    if datasets != DATASETS:
        notes += (f"5-datasets run on {', '.join(datasets)} instead of {', '.join(DATASETS)}",)
    if "fashion_mnist" in datasets and released:
        notes += ("protocol released: task fashion_mnist holds MNIST's images, as in the authors' code",)
    return Benchmark("five_datasets", data, LazyTasks(n_tasks, build), opened.sources, notes)


def _checked(datasets: Sequence[str]) -> tuple[str, ...]:
    known = ", ".join(DATASETS)
    unknown = [name for name in datasets if name not in DATASETS]
    if unknown:
        raise InputError(f"unknown data set {unknown[0]!r}; known are {known}")
    if not datasets or len(set(datasets)) < len(datasets):
        raise InputError(f"datasets are {', '.join(datasets) or 'none'}; name one or more of {known}, each once")
    return tuple(datasets)


def pad_to_32(images: np.ndarray) -> np.ndarray:
    """Images (n, 28, 28) with two black pixels on every side; 32x32 ones as they are."""
    if images.shape[1] == 32:
        return images
    return np.pad(images, ((0, 0), (2, 2), (2, 2)))  # (n, 32, 32)


def resize_to_32(images: np.ndarray) -> np.ndarray:
    """Resize 28x28 grey images with Pillow's Lanczos filter, all at once.

    Pillow resizes rows first, then columns, rounding to bytes in between, and a row's result depends on that row alone.
    So all images' rows can form one tall image, then all images' columns another: the same bytes as one by one.

    Args:
        images: (n, 28, 28) uint8.
    Returns:
        (n, 32, 32) uint8.
    """
    wide = _resize_rows(images)  # (n, 28, 32)
    return np.ascontiguousarray(_resize_rows(wide.transpose(0, 2, 1)).transpose(0, 2, 1))  # (n, 32, 32)


def _resize_rows(images: np.ndarray) -> np.ndarray:
    from PIL import Image  # needed for notMNIST only

    n, rows, columns = images.shape
    tall = Image.fromarray(np.ascontiguousarray(images).reshape(n * rows, columns))
    return np.asarray(tall.resize((32, n * rows), Image.Resampling.LANCZOS)).reshape(n, rows, 32)


def _three_channels(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1).contiguous()  # (n, 3, 32, 32)
