"""20-task CIFAR-100: one task per superclass, five classes each, in one of five published orders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dataloader.cifar100 import MEAN, STD
from dataloader.images.superclasses import SUPERCLASS_OF, SUPERCLASSES
from dataloader.sets import open_sets
from dataloader.splits import VALIDATION, check_common, class_task, normalise, task_generator
from engine.task import Benchmark, LazyTasks, Task
from gradproj.errors import InputError

# fmt: off
TASK_ORDERS = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19),
    (15, 12, 5, 9, 7, 16, 18, 17, 1, 0, 3, 8, 11, 14, 10, 6, 2, 4, 13, 19),
    (17, 1, 19, 18, 12, 7, 6, 0, 11, 15, 10, 5, 13, 3, 9, 16, 4, 14, 2, 8),
    (11, 9, 6, 5, 12, 4, 0, 10, 13, 7, 14, 3, 15, 16, 8, 1, 2, 19, 18, 17),
    (6, 14, 0, 11, 12, 17, 13, 4, 9, 1, 7, 19, 8, 10, 3, 15, 18, 5, 2, 16),
)
# fmt: on


def load(
    *,
    seed: int,
    t_order: int = 0,
    n_tasks: int = 20,
    pc_valid: float = 0.05,
    protocol: str = "paper",
    n_train: int | None = None,
    data: str = "real",
    data_dir: str | Path = "data",
    device: torch.device | str = "cpu",
) -> Benchmark:
    """The 20-task CIFAR-100 superclass benchmark: within a task the five fine labels, ascending, become 0 to 4.

    Args:
        seed: with the superclass decides which images are held out, whatever the order of tasks.
        t_order: 0 to 4, which of the published task orders.
        n_tasks: 1 to 20, from the start of the order.
        pc_valid: fraction of each task's training images held out at random.
        protocol: "paper"; or "released", which does what the authors' code does: pixels scrambled by
            `scrambled_images`, a hold-out of 5 % drawn with seed 0 whatever `seed` and `pc_valid` say.
        n_train: training images per class to use before the hold-out; None for all.
        data: "real" or "embedded".
        data_dir: where the array cache is, or goes.
        device: where the tasks' tensors live.
    Returns:
        tasks with images (n, 3, 32, 32) float32 and labels 0 to 4.
    Raises:
        InputError: an argument is out of range.
        DataError: images are missing or damaged.
    """
    check_common(seed=seed, n_tasks=n_tasks, most=20, pc_valid=pc_valid, n_train=n_train, protocol=protocol)
    if not 0 <= t_order < len(TASK_ORDERS):
        raise InputError(f"t_order is {t_order}; it must be 0 to {len(TASK_ORDERS) - 1}")
    source = "cifar100" if data == "real" else "cifar100_superclass"  # the stand-in is a set of its own
    opened = open_sets([source], data, data_dir)
    released = protocol == "released"
    split_seed, fraction = (0, 0.05) if released else (seed, pc_valid)

    def build(t: int) -> Task:
        superclass = TASK_ORDERS[t_order][t]
        return class_task(
            opened.sets[source],
            np.flatnonzero(np.array(SUPERCLASS_OF) == superclass),
            scrambled_images if released else lambda images: normalise(images, MEAN, STD),
            name=SUPERCLASSES[superclass],
            pc_valid=fraction,
            generator=task_generator(split_seed, superclass, VALIDATION),
            n_train=n_train,
            device=device,
        )

    notes = opened.notes
    if released:
        notes += ("protocol released: superclass images are scrambled and not normalised, validation is fixed",)
    return Benchmark("cifar100_superclass", data, LazyTasks(n_tasks, build), opened.sources, notes)


def scrambled_images(images: np.ndarray) -> Tensor:
    """Images as the released code makes them: bytes of one layout read as another, divided by 255, not normalised.

    CIFAR-100 stores an image channel by channel, 3072 numbers in (3, 32, 32) order. The released code takes them to
    be in (32, 32, 3) order and then moves the last axis to the front.

    Args:
        images: (n, 32, 32, 3) uint8, proper images.
    Returns:
        (n, 3, 32, 32) float32 in [0, 1].
    """
    stored = np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(-1, 32, 32, 3)  # read in the wrong order
    return normalise(stored, (0.0,), (1.0,))
