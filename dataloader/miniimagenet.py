"""20-split miniImageNet: twenty tasks of five classes of 84x84 images, a head each (paper Section 6)."""

from __future__ import annotations

from pathlib import Path

import torch

from dataloader.sets import open_sets
from dataloader.splits import VALIDATION, check_common, class_task, normalise, task_generator
from engine.task import Benchmark, LazyTasks, Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
CLASSES_PER_TASK = 5


def load(
    *,
    seed: int,
    n_tasks: int = 20,
    pc_valid: float = 0.02,
    n_train: int | None = None,
    data: str = "real",
    data_dir: str | Path = "data",
    device: torch.device | str = "cpu",
) -> Benchmark:
    """The 20-split miniImageNet benchmark: task t holds classes 5t to 5t + 4, relabelled 0 to 4.

    Args:
        seed: with the task's number decides which images are held out.
        n_tasks: 1 to 20.
        pc_valid: fraction of each task's training images held out at random.
        n_train: training images per class to use before the hold-out; None for all.
        data: "real" or "embedded".
        data_dir: where the images are, in miniimagenet/: class folders, or the array cache that is made of them.
        device: where the tasks' tensors live.
    Returns:
        tasks with images (n, 3, 84, 84) float32 and labels 0 to 4.
    Raises:
        InputError: an argument is out of range.
        DataError: images are missing or damaged.
    """
    check_common(seed=seed, n_tasks=n_tasks, most=20, pc_valid=pc_valid, n_train=n_train)
    opened = open_sets(["miniimagenet"], data, data_dir)

    def build(t: int) -> Task:
        classes = range(t * CLASSES_PER_TASK, (t + 1) * CLASSES_PER_TASK)
        return class_task(
            opened.sets["miniimagenet"],
            classes,
            lambda images: normalise(images, MEAN, STD),
            name=f"classes {classes[0]} to {classes[-1]}",
            pc_valid=pc_valid,
            generator=task_generator(seed, t, VALIDATION),
            n_train=n_train,
            device=device,
        )

    return Benchmark("miniimagenet", data, LazyTasks(n_tasks, build), opened.sources, opened.notes)
