"""Where raw images come from: the array cache when it is there, a download that fills it when not."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from filelock import AcquireReturnProxy, FileLock, Timeout

from dataloader.errors import DataError
from dataloader.images import cache
from dataloader.images.cache import SPECS, RawSet
from gradproj.errors import InputError, one_line

NAMES = tuple(SPECS)
PATIENCE = 3  # seconds to wait for another process without a word


def load_raw(name: str, data_dir: str | Path) -> RawSet:
    """One of the published data sets, downloaded (miniImageNet: read from class folders) and converted on first use.

    Args:
        name: one of `NAMES`.
        data_dir: holds a folder per set with {train,test}_images.npy (uint8) and {train,test}_labels.npy (int64).
    Returns:
        images memory-mapped, labels in memory, in stored order.
    Raises:
        InputError: unknown name.
        DataError: the cache is damaged, or there is none and no images to make it of.
    """
    if name not in SPECS:
        raise InputError(f"unknown data set {name!r}; known are {', '.join(NAMES)}")
    data_dir = Path(data_dir)
    folder = data_dir / name
    if cache.missing_files(folder):
        _fill_cache(name, data_dir, folder)
    return cache.read_cache(folder, SPECS[name])


def _fill_cache(name: str, data_dir: Path, folder: Path) -> None:
    if name == "miniimagenet" and not folder.is_dir():
        _published(name, data_dir)  # which says so, before a folder is made for the lock
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with _lock(data_dir / f".{name}.lock"):
            if cache.missing_files(folder):  # else another process filled it while this one waited
                cache.write_cache(folder, _published(name, data_dir))
    except DataError:
        raise
    except Exception as error:  # whatever torchvision, the network or the disk throws, the way out is the same
        raise DataError(_way_out(name, folder, error)) from error


def _lock(path: Path) -> AcquireReturnProxy:
    """A lock that others may hold for as long as a download takes, which is said."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=PATIENCE)
    except Timeout:
        print(f"waiting for {path}: another process is preparing these images", file=sys.stderr)
        return lock.acquire()


def _published(name: str, data_dir: Path) -> RawSet:
    if name == "miniimagenet":
        from dataloader.images.miniimagenet import read_folder  # needs Pillow, which the cache does not

        return read_folder(data_dir / name, SPECS[name])
    from dataloader.images.download import download  # torchvision is needed for downloads only

    return download(name, data_dir)


def _way_out(name: str, folder: Path, error: Exception) -> str:
    """One line: what failed, where the files belong, and how to do without them."""
    reason = one_line(error, most=1000)
    refusal = re.search(r"urlopen error (?:\[[^]]*\] )?([^>]+)>", reason)  # urllib's wrapping says nothing more
    reason = refusal[1] if refusal else reason
    if name == "miniimagenet":  # read from a folder, without a download that could have failed
        return f"{name}: cannot keep the images as arrays in {folder}: {reason[:200]}; they take 1.3 GB"
    files = ", ".join(cache.missing_files(folder))
    archive = " (or notMNIST_small.tar.gz)" if name == "notmnist" else ""
    return (
        f"{name}: no images in {folder} and no download ({reason[:200]}); "
        f"put {files}{archive} into {folder}, or run with --data embedded"
    )
