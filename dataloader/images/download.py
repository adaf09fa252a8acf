"""Published data sets from their published places, as arrays; used once per set, to fill the array cache."""

from __future__ import annotations

import contextlib
import io
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataloader.errors import DataError
from dataloader.images import content, notmnist
from dataloader.images.cache import RawSet
from engine.torchvision import import_torchvision

TIMEOUT_SECONDS = 10  # of silence on a connection; without internet the user hears of it in seconds


def download(name: str, data_dir: Path) -> RawSet:
    """Fetch one set; archives stay in `data_dir`, where an earlier download of torchvision's is used again.

    Args:
        name: one of `raw.NAMES`.
        data_dir: holds the array cache, and torchvision's own folders.
    Returns:
        images and labels in the order of the published files; notMNIST's split is made here.
    Raises:
        DataError: what arrived is not the published set.
        Exception: whatever torchvision or the network raises.
    """
    with _short_timeouts(), contextlib.redirect_stdout(io.StringIO()):  # torchvision prints its failed attempts
        if name == "notmnist":
            raw = notmnist.fetch(data_dir / name, TIMEOUT_SECONDS)
        elif name == "svhn":
            raw = _svhn(data_dir)
        else:
            raw = _from_torchvision(name, data_dir)
    found = (
        content.content_checksum(raw.train_images, raw.train_labels),
        content.content_checksum(raw.test_images, raw.test_labels),
    )
    if content.KNOWN.get(name, found) != found:
        raise DataError(f"{name}: the files under {data_dir} are not the published images; delete them and try again")
    return raw


def _from_torchvision(name: str, data_dir: Path) -> RawSet:
    datasets = import_torchvision("datasets")
    classes = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10", "cifar100": "CIFAR100"}
    arrays = []
    for train in (True, False):
        part = getattr(datasets, classes[name])(data_dir, train=train, download=True)
        arrays += [np.asarray(part.data), np.asarray(part.targets, dtype=np.int64)]
    return RawSet(*arrays)


def _svhn(data_dir: Path) -> RawSet:
    datasets = import_torchvision("datasets")
    arrays: list[np.ndarray] = []
    for part in ("train", "test"):
        url, file_name, md5 = datasets.SVHN.split_list[part]
        datasets.utils.download_url(url, data_dir, file_name, md5)
        arrays += read_svhn_mat(data_dir / file_name)
    return RawSet(*arrays)


def read_svhn_mat(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One of SVHN's cropped-digits files: X (32, 32, 3, n) uint8, y (n, 1) with 10 for the digit 0.

    Returns:
        images (n, 32, 32, 3) uint8 and labels (n,) int64, 0 to 9.
    Raises:
        DataError: the file is not of that kind.
    """
    from scipy.io import loadmat  # for SVHN only

    try:
        arrays = loadmat(path, variable_names=["X", "y"])
        x, y = arrays["X"], arrays["y"].astype(np.int64).ravel()
    except Exception as error:  # scipy raises nearly anything on a damaged file
        raise DataError(f"{path} cannot be read as a MATLAB file with X and y; delete it and try again") from error
    if x.dtype != np.uint8 or x.shape != (32, 32, 3, len(y)) or len(y) == 0 or not 1 <= y.min() <= y.max() <= 10:
        wanted = "X uint8 (32, 32, 3, n) and y (n, 1) from 1 to 10"
        raise DataError(f"{path} holds X {x.dtype} {x.shape} and y {y.shape}, not {wanted}; delete it and try again")
    return np.ascontiguousarray(x.transpose(3, 0, 1, 2)), y % 10


@contextlib.contextmanager
def _short_timeouts() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
