"""notMNIST "small": letters A to J in many fonts, from its author's archive of PNG files."""

from __future__ import annotations

import hashlib
import io
import shutil
import sys
import tarfile
import urllib.request
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

from dataloader.errors import DataError
from dataloader.images.cache import RawSet
from dataloader.images.content import content_order

ARCHIVE = "notMNIST_small.tar.gz"
URL = f"http://yaroslavvb.com/upload/notMNIST/{ARCHIVE}"
MD5 = "c9890a473a9769fda4bdf314aaf500dd"
SPLIT_SEED, TRAIN_FRACTION = 42, 0.9
_LARGEST_PNG = 100_000  # bytes; the real ones have a few hundred


def fetch(folder: Path, timeout: float) -> RawSet:
    """The set from `folder`'s archive, downloaded if it is not there.

    Args:
        folder: where the archive is, or goes.
        timeout: seconds of silence after which a download is given up.
    Returns:
        training images a random 90 %, test images the rest.
    Raises:
        DataError: the archive is not the published one.
        OSError: the download failed.
    """
    archive = folder / ARCHIVE
    if archive.is_file():
        _verify(archive)
    else:
        _download(archive, timeout)
    images, labels, n_skipped = read_archive(archive)
    print(f"notmnist: {len(labels):,} images, {n_skipped} undecodable files skipped", file=sys.stderr)
    return split(images, labels)


def _download(archive: Path, timeout: float) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    partial = archive.with_name(archive.name + ".part")
    with urllib.request.urlopen(URL, timeout=timeout) as response, partial.open("wb") as file:
        shutil.copyfileobj(response, file)
    _verify(partial)  # before it takes the name that is never downloaded again
    partial.replace(archive)


def _verify(archive: Path) -> None:
    found = hashlib.md5(archive.read_bytes()).hexdigest()  # 8 MB
    if found != MD5:
        raise DataError(f"{archive} has MD5 {found}, not {MD5}; delete it and try again")


def read_archive(path: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """Decode an archive's images in memory; nothing is extracted to disk.

    Only regular *.png files in folders named A to J are looked at.

    Returns:
        images (n, 28, 28) uint8, labels (n,) int64 with A = 0, and how many such files were not 28x28 PNG images.
    Raises:
        DataError: not a tar.gz file, holds no image, or holds a link, a device or a path that leads outside.
    """
    images, labels, n_skipped = [], [], 0
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts or not (member.isfile() or member.isdir()):
                    raise DataError(f"{path} holds {member.name!r}, which no data set needs; delete the archive")
                if not member.isfile() or name.suffix != ".png" or name.parent.name not in tuple("ABCDEFGHIJ"):
                    continue
                image = _decode(archive, member)
                if image is None:
                    n_skipped += 1
                else:
                    images.append(image)
                    labels.append(ord(name.parent.name) - ord("A"))
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path} is not a complete tar.gz archive; delete it and try again") from error
    if not images:
        raise DataError(f"{path} holds no 28x28 PNG files in folders A to J; delete it and try again")
    return np.stack(images), np.array(labels, dtype=np.int64), n_skipped


def _decode(archive: tarfile.TarFile, member: tarfile.TarInfo) -> np.ndarray | None:
    from PIL import Image  # for the archive only; the array cache needs no Pillow

    if member.size > _LARGEST_PNG:
        return None
    data = archive.extractfile(member).read()
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
            return np.asarray(image.convert("L")) if image.size == (28, 28) else None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def split(images: np.ndarray, labels: np.ndarray) -> RawSet:
    """90 % for training and the rest for testing, at random with seed 42, whatever order the images come in."""
    order = content_order(images, labels)[np.random.default_rng(SPLIT_SEED).permutation(len(labels))]
    train, test = np.split(order, [int(TRAIN_FRACTION * len(order))])
    return RawSet(images[train], labels[train], images[test], labels[test])
