"""10-split CIFAR-100: ten tasks of ten classes, a head each (paper Section 6)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dataloader.sets import open_sets
from dataloader.splits import CLASS_ORDER, VALIDATION, check_common, class_task, normalise, task_generator
from engine.task import Benchmark, LazyTasks, Task
from gradproj.errors import InputError

MEAN, STD = (125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)
CLASSES_PER_TASK = 10


def load(
    *,
    seed: int,
    n_tasks: int = 10,
    pc_valid: float = 0.05,
    n_train: int | None = None,
    class_order_seed: int | None = None,
    data: str = "real",
    data_dir: str | Path = "data",
    device: torch.device | str = "cpu",
) -> Benchmark:
    """The 10-split CIFAR-100 benchmark: task t holds fine labels 10t to 10t + 9, relabelled 0 to 9.

    Args:
        seed: with the task's number decides which images are held out.
        n_tasks: 1 to 10.
        pc_valid: fraction of each task's training images held out at random.
        n_train: training images per class to use before the hold-out; None for all.
        class_order_seed: None for the published order of classes, else a seed that shuffles all hundred.
        data: "real" or "embedded".
        data_dir: where the array cache is, or goes.
        device: where the tasks' tensors live.
    Returns:
        tasks with images (n, 3, 32, 32) float32 and labels 0 to 9.
    Raises:
        InputError: an argument is out of range.
        DataError: images are missing or damaged.
    """
    check_common(seed=seed, n_tasks=n_tasks, most=10, pc_valid=pc_valid, n_train=n_train)
    if class_order_seed is not None and class_order_seed < 0:
        raise InputError(f"class_order_seed is {class_order_seed}; it must be 0 or more, or not given")
    opened = open_sets(["cifar100"], data, data_dir)
    class_order = np.arange(100)
    if class_order_seed is not None:
        class_order = task_generator(class_order_seed, 0, CLASS_ORDER).permutation(100)

    def build(t: int) -> Task:
        classes = class_order[t * CLASSES_PER_TASK : (t + 1) * CLASSES_PER_TASK]
        listed = f"{classes[0]} to {classes[-1]}" if class_order_seed is None else ", ".join(map(str, classes))
        return class_task(
            opened.sets["cifar100"],
            classes,
            lambda images: normalise(images, MEAN, STD),
            name=f"classes {listed}",
            pc_valid=pc_valid,
            generator=task_generator(seed, t, VALIDATION),
            n_train=n_train,
            device=device,
        )

    return Benchmark("cifar100", data, LazyTasks(n_tasks, build), opened.sources, opened.notes)
