"""Tasks from data of your own: tensors, image folders, torchvision data sets, anything that a DataLoader can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from dataloader.images.files import UnreadableImage, read_image
from dataloader.images.folder import image_folder
from dataloader.splits import ORDER, TEST, VALIDATION, holdout, n_held_out, task_generator
from engine import hardware
from engine.task import LazyTasks, Split, Task
from gradproj.errors import InputError, one_line

__all__ = ["by_class", "image_folder", "mixed", "read_groups", "read_image", "stream", "task"]
KEYS = ("image", "label")  # of data whose items are dicts
BATCH_SIZE = 256  # of images that are read at once

Data = Split | tuple | Dataset | Iterable
Class = str | int


def stream(data: Data, keys: tuple[str, str] = KEYS) -> Split:
    """All images and labels of some data, as tensors.

    Args:
        data: a pair of images and labels, tensors or arrays; a data set of (image, label) pairs or of dicts, such as
            torchvision's and Hugging Face's; or an iterable of batches of these, such as a DataLoader.
        keys: where items are dicts, the names of image and label in them.
    Returns:
        images as they come, and labels (n,) int64.
    Raises:
        InputError: the data cannot be read, or are not tensors of one shape.
    """
    if isinstance(data, tuple):
        pairs = [data]
    elif isinstance(data, DataLoader) or not (isinstance(data, Dataset) or hasattr(data, "__getitem__")):
        pairs = data
    else:
        pairs = DataLoader(data, batch_size=BATCH_SIZE)
    images, labels = [], []
    try:
        for pair in pairs:
            some, theirs = (pair[key] for key in keys) if isinstance(pair, dict) else pair
            images.append(torch.as_tensor(some))
            labels.append(torch.as_tensor(theirs))
        split = Split(torch.cat(images), torch.cat(labels))
    except InputError:
        raise
    except UnreadableImage as error:
        raise InputError(str(error)) from error
    except Exception as error:  # whatever a data set, its transform or a decoder raises
        if hardware.is_out_of_memory(error):
            raise
        hint = "images must come as tensors of one shape: give the data set a transform that resizes and converts them"
        reason = one_line(error)
        raise InputError(f"cannot read {type(data).__name__} ({type(error).__name__}: {reason}); {hint}") from error
    if split.labels.is_floating_point() or split.labels.ndim != 1:
        found = f"{split.labels.dtype} {tuple(split.labels.shape)}"
        raise InputError(f"the labels of {type(data).__name__} are {found}; they must be one whole number an image")
    if len(split.images) != len(split.labels):
        raise InputError(f"{type(data).__name__} has {_counts(split)}; there must be one label for each image")
    return Split(split.images, split.labels.long())


def _counts(split: Split | tuple) -> str:
    return f"{len(split[0])} images and {len(split[1])} labels"


def task(
    name: str,
    train: Data,
    test: Data,
    valid: Data | None = None,
    *,
    classes: Sequence[int] | None = None,
    names: Sequence[Class] | None = None,
    pc_valid: float = 0.05,
    seed: int = 1,
    keys: tuple[str, str] = KEYS,
) -> Task:
    """A task of data at hand.

    Args:
        name: of the task.
        train, test: see `stream`.
        valid: its validation images; where not given, some of the training images are held out.
        classes: labels in the order of the outputs; default those of the training images, ascending.
        names: what the classes are called, in the same order; default their numbers.
        pc_valid: fraction of the training images to hold out, drawn at random.
        seed: together with their number decides which.
        keys: see `stream`.
    Raises:
        InputError: the data cannot be read, or have labels that are not among the classes.
    """
    _check_fractions(pc_valid=pc_valid)
    parts = {"train": stream(train, keys), "test": stream(test, keys)}
    classes = parts["train"].labels.unique().tolist() if classes is None else list(classes)
    if len(set(classes)) < len(classes):
        raise InputError(f"{name}: classes are {classes}; each must be there once")
    if valid is None:
        images, labels = parts["train"]
        rows = holdout(len(labels), pc_valid, task_generator(seed, 0, VALIDATION))
        parts["train"], parts["valid"] = (Split(images[index], labels[index]) for index in map(torch.from_numpy, rows))
    else:
        parts["valid"] = stream(valid, keys)
    numbered = {
        part: mixed(Split(split.images, _numbered(split.labels, classes, name))) for part, split in parts.items()
    }
    return Task(name, len(classes), **numbered, classes=tuple(classes if names is None else names))


def _check_fractions(**fractions: float) -> None:
    for name, value in fractions.items():
        if not 0 <= value < 1:
            raise InputError(f"{name} is {value}; it must be in [0, 1)")


def mixed(split: Split) -> Split:
    """The same images in a fixed order that looks random: BatchNorm takes its statistics of each batch at test too, and
    in the order in which data usually lie, class after class, a batch would hold one class."""
    order = torch.from_numpy(task_generator(0, 0, ORDER).permutation(len(split.labels))).to(split.labels.device)
    return Split(split.images[order], split.labels[order])


def _numbered(labels: Tensor, classes: Sequence[int], name: str) -> Tensor:
    """The place of each label among the classes."""
    among = torch.from_numpy(_whole(classes))
    matches = labels[:, None].cpu() == among  # (n, classes)
    unknown = labels.cpu()[~matches.any(1)].unique().tolist()
    if unknown:
        raise InputError(
            f"{name} has labels {', '.join(map(str, unknown[:5]))}, which are none of its classes {classes}"
        )
    return matches.long().argmax(1).to(labels.device)


def by_class(
    train: Data,
    groups: Sequence[Sequence[Class]],
    test: Data | None = None,
    *,
    pc_valid: float = 0.05,
    pc_test: float = 0.2,
    seed: int = 1,
    n_train: int | None = None,
    keys: tuple[str, str] = KEYS,
) -> LazyTasks:
    """One task for each group of classes; its images are read when it is asked for.

    Args:
        train: see `stream`. The labels of a data set that has no `targets` are read once, with its images.
        groups: of each task, its classes in the order of the outputs: names where the data set has them in `classes`,
            else labels.
        test: where not given, a part of each class is held out.
        pc_valid, pc_test: fractions of the images of a task, and of a class, to hold out, drawn at random.
        seed: decides which, together with a class's name or label, and with the task's number.
        n_train: training images of each class to use, before validation images are held out; None for all.
        keys: see `stream`.
    Raises:
        InputError: a class is not there, is named twice, or has no test images.
    """
    _check_fractions(pc_valid=pc_valid, pc_test=pc_test)
    chosen = [name for group in groups for name in group]
    if not groups or not all(groups):
        raise InputError("a task has no classes; give each at least one")
    if twice := {name for name in chosen if chosen.count(name) > 1}:
        which = sorted(map(str, twice))[0]
        raise InputError(
            f"class {which} is named twice; each belongs to one task (a line without commas is cut at blanks)"
        )
    train_rows = rows_of_classes(train, chosen, keys)
    by_first_row: dict[int, Class] = {}
    for name, rows in train_rows.items():
        if (other := by_first_row.setdefault(int(rows[0]), name)) is not name:
            raise InputError(f"{other!r} and {name!r} are the same class; each belongs to one task")
    if test is None:
        held_out = {c: _test_rows(len(rows), c, pc_test, seed) for c, rows in train_rows.items()}
        test, test_rows = train, {c: rows[held_out[c]] for c, rows in train_rows.items()}
        train_rows = {c: np.delete(rows, held_out[c]) for c, rows in train_rows.items()}
    else:
        test_rows = rows_of_classes(test, chosen, keys)
    for name in chosen:
        if not len(train_rows[name]) or not len(test_rows[name]):
            raise InputError(f"class {name} has too few images; it must have some to train on and some to test on")

    def part(data: Data, rows: dict[Class, np.ndarray], group: Sequence[Class]) -> Split:
        labels = torch.cat([torch.full((len(rows[c]),), i) for i, c in enumerate(group)])
        return Split(subset(data, np.concatenate([rows[c] for c in group]), keys).images, labels)

    def build(t: int) -> Task:
        group = groups[t]
        rows = {c: train_rows[c][:n_train] for c in group}
        images, labels = part(train, rows, group)
        learned, held = map(torch.from_numpy, holdout(len(labels), pc_valid, task_generator(seed, t, VALIDATION)))
        parts = Split(images[learned], labels[learned]), Split(images[held], labels[held]), part(test, test_rows, group)
        return Task(", ".join(map(str, group)), len(group), *map(mixed, parts), classes=tuple(group))

    def sizes(group: Sequence[Class]) -> dict[str, int]:
        n = sum(len(train_rows[c][:n_train]) for c in group)
        n_valid = n_held_out(n, pc_valid)
        return {"train": n - n_valid, "valid": n_valid, "test": sum(len(test_rows[c]) for c in group)}

    return LazyTasks(len(groups), build, sizes=list(map(sizes, groups)))


def rows_of_classes(data: Data, classes: Sequence[Class], keys: tuple[str, str]) -> dict[Class, np.ndarray]:
    """The places of each class's images in some data.

    Raises:
        InputError: a class is not there.
    """
    labels, names = labels_of(data, keys), list(getattr(data, "classes", []))
    rows = {}
    for name in classes:
        label = names.index(name) if name in names else name
        rows[name] = np.flatnonzero(labels == label) if isinstance(label, (int, np.integer)) else np.empty(0, int)
        if not len(rows[name]):
            there = ", ".join(str(other) for other in names or np.unique(labels).tolist() if other != "")
            where = f" in {data.name}" if isinstance(getattr(data, "name", None), str) else ""
            raise InputError(f"there is no class {name}{where}; there are: {there[:300]}")
    return rows


def labels_of(data: Data, keys: tuple[str, str]) -> np.ndarray:
    """The labels of some data, without reading its images where it tells them: (n,) int64."""
    if isinstance(data, tuple):
        if len(data[0]) != len(data[1]):
            raise InputError(f"{type(data).__name__} has {_counts(data)}; there must be one label for each image")
        return _whole(data[1])
    if isinstance(data, DataLoader) or not hasattr(data, "__getitem__") or isinstance(data, IterableDataset):
        raise InputError(f"a {type(data).__name__} has no order to choose images from; give by_class stream(…) of it")
    for name in ("targets", "labels"):
        if hasattr(data, name):
            return _whole(getattr(data, name))
    if hasattr(data, "column_names"):  # Hugging Face's
        return _whole(data[keys[1]])
    return stream(data, keys).labels.numpy()


def _whole(labels: Any) -> np.ndarray:
    """Labels as (n,) int64; raises InputError where that would change them."""
    given = np.asarray(labels)
    whole = given.dtype.kind in "iub" or (given.dtype.kind == "f" and (given == given.round()).all())
    if given.ndim != 1 or not whole:
        raise InputError(f"the labels are {given.dtype} {given.shape}; they must be one whole number an image")
    return given.astype(np.int64)


def subset(data: Data, rows: np.ndarray, keys: tuple[str, str]) -> Split:
    """Some images of some data, with their labels."""
    if isinstance(data, tuple):
        return Split(*(torch.as_tensor(part)[torch.from_numpy(rows)] for part in data))
    return stream(Subset(data, rows.tolist()), keys)


def read_groups(path: str | Path) -> list[list[str]]:
    """The classes of each task, from a text file with a line for each task: names with commas, or spaces, between them.

    Lines that begin with # are comments.

    Raises:
        InputError: the file cannot be read or names no class.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({error}); it must have a line of class names for each task") from error
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    groups = [[name.strip() for name in (line.split(",") if "," in line else line.split())] for line in lines]
    groups = [[name for name in group if name] for group in groups if any(group)]
    if not groups:
        raise InputError(f"{path} names no class; it must have a line of class names for each task")
    return groups


def _test_rows(n: int, name: Class, pc_test: float, seed: int) -> np.ndarray:
    """Which of a class's images are held out for the test, whichever task the class is in."""
    number = int.from_bytes(str(name).encode(), "big")
    return np.sort(task_generator(seed, number, TEST).permutation(n)[: n_held_out(n, pc_test)])
