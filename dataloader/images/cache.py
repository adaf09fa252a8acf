"""The array cache: four .npy files in a folder per set, written completely or not at all, read memory-mapped."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataloader.errors import DataError


class RawSet(NamedTuple):
    """A data set as published: bytes and class numbers, in stored order."""

    train_images: np.ndarray  # (n, h, w) or (n, h, w, 3) uint8, perhaps memory-mapped
    train_labels: np.ndarray  # (n,) int64
    test_images: np.ndarray
    test_labels: np.ndarray


class Spec(NamedTuple):
    """What a set has to look like."""

    shape: tuple[int, ...]  # of one image
    n_classes: int
    n_train: int  # images in the complete set
    n_test: int


SPECS = {
    "mnist": Spec((28, 28), 10, 60_000, 10_000),
    "fashion_mnist": Spec((28, 28), 10, 60_000, 10_000),
    "notmnist": Spec((28, 28), 10, 16_851, 1_873),
    "cifar10": Spec((32, 32, 3), 10, 50_000, 10_000),
    "cifar100": Spec((32, 32, 3), 100, 50_000, 10_000),
    "svhn": Spec((32, 32, 3), 10, 73_257, 26_032),
    "miniimagenet": Spec((84, 84, 3), 100, 50_000, 10_000),
}
FILES = tuple(f"{field}.npy" for field in RawSet._fields)


def missing_files(folder: Path) -> list[str]:
    """Names of the cache files that `folder` lacks."""
    return [name for name in FILES if not (folder / name).is_file()]


def read_cache(folder: Path, spec: Spec) -> RawSet:
    """Open a complete cache without reading the images into memory.

    Args:
        folder: holds the four files of `FILES`.
        spec: shape and classes to expect; the number of images may differ from the complete set's.
    Returns:
        images memory-mapped read-only, labels in memory.
    Raises:
        DataError: a file is damaged or does not fit `spec`; the message names it.
    """
    arrays = {}
    for part in ("train", "test"):
        images_path, labels_path = folder / f"{part}_images.npy", folder / f"{part}_labels.npy"
        images, labels = _open(images_path), _open(labels_path)
        if images.dtype != np.uint8 or images.shape[1:] != spec.shape or len(images) == 0:
            wanted = f"uint8 (n, {', '.join(map(str, spec.shape))}) with n > 0"
            raise _damaged(images_path, f"holds {images.dtype} {images.shape}, not {wanted}")
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
            wanted = f"int64 ({len(images)},), one per image"
            raise _damaged(labels_path, f"holds {labels.dtype} {labels.shape}, not {wanted}")
        labels = np.array(labels, dtype=np.int64)
        if labels.min() < 0 or labels.max() >= spec.n_classes:
            found = f"{labels.min()} to {labels.max()}"
            raise _damaged(labels_path, f"holds labels {found}, not 0 to {spec.n_classes - 1}")
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = images, labels
    return RawSet(**arrays)


def write_cache(folder: Path, raw: RawSet) -> None:
    """Write a set so that nobody ever sees half of it.

    All files are first written and synced in a temporary folder beside `folder`, then renamed into place: the whole
    folder at once, or file by file where `folder` already exists. A folder that lacks a file is not a cache. Callers
    hold the set's lock, so what a killed process left of an earlier attempt is deleted.

    Raises:
        OSError: the disk is full or read-only.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        temporary.chmod(0o755)  # mkdtemp's 0700 would shut colleagues out of a shared folder
        for name, array in zip(FILES, raw, strict=True):
            with (temporary / name).open("wb") as file:
                np.save(file, np.ascontiguousarray(array), allow_pickle=False)
                file.flush()
                os.fsync(file.fileno())
        if folder.exists():
            for name in FILES:
                (folder / name).unlink(missing_ok=True)  # an old file beside a new one would look complete
            for name in FILES:
                (temporary / name).replace(folder / name)
        else:
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(path: Path) -> np.ndarray:
    try:
        with path.open("rb") as file:
            if file.read(6) != b"\x93NUMPY":  # np.load would take it for an archive or a pickle
                raise ValueError("not an array file")
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError, OverflowError, SyntaxError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise _damaged(path, f"cannot be read ({reason})") from error


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(f"{path} {problem}; replace it if it is your own, else delete this file to have it made again")
