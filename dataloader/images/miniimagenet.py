"""miniImageNet from a folder of class folders: nobody may pass ImageNet's images on, so there is no download."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dataloader.errors import DataError
from dataloader.images.cache import RawSet, Spec, missing_files
from dataloader.images.files import UnreadableImage, read_image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")


def read_folder(folder: Path, spec: Spec) -> RawSet:
    """All images, of every class the first ones in file order for training and the last for testing.

    Args:
        folder: holds a folder for each class, with as many image files as `spec` says and nothing else that counts.
        spec: shape of an image once resized, number of classes, images in all; the same number of each class.
    Returns:
        classes numbered in the order of their folders' names.
    Raises:
        DataError: there are no class folders, too few or too many, or a file is no image or too small.
    """
    per_class, n_train = (spec.n_train + spec.n_test) // spec.n_classes, spec.n_train // spec.n_classes
    files = [_image_files(path, per_class) for path in _class_folders(folder, spec.n_classes)]
    print(f"miniimagenet: reading {per_class * len(files):,} images from {folder}, once", file=sys.stderr)
    images = np.empty((len(files), per_class, *spec.shape), dtype=np.uint8)
    pool = ThreadPoolExecutor()
    try:
        paths = [path for of_class in files for path in of_class]
        for i, image in enumerate(pool.map(lambda path: _read_image(path, spec.shape), paths)):
            images[divmod(i, per_class)] = image
    finally:
        pool.shutdown(cancel_futures=True)  # of a damaged file one wants to hear before all others are read
    parts = []
    for part in (images[:, :n_train], images[:, n_train:]):
        parts += [part.reshape(-1, *spec.shape), np.repeat(np.arange(spec.n_classes), part.shape[1])]
    return RawSet(*parts)


def _class_folders(folder: Path, n_classes: int) -> list[Path]:
    found = sorted(path for path in folder.glob("[!.]*") if path.is_dir())
    if not found:
        arrays = ", ".join(missing_files(folder))
        raise DataError(
            f"miniimagenet: no images in {folder}, and nobody may offer them for download; get from image-net.org "
            "those that Ravi and Larochelle list (github.com/twitter-research/meta-learning-lstm), put each class's "
            f"into a folder of its own, {folder / 'CLASS'} (or {arrays} into {folder}), or run with --data embedded"
        )
    if len(found) != n_classes:
        names = ", ".join(path.name for path in found[:3]) + (", …" if len(found) > 3 else "")
        raise DataError(
            f"miniimagenet: {folder} holds {len(found)} folders ({names}); it must hold {n_classes}, one for each "
            "class and not within train, val and test"
        )
    return found


def _image_files(folder: Path, n: int) -> list[Path]:
    found = sorted(path for path in folder.glob("[!.]*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if len(found) != n:
        raise DataError(f"miniimagenet: {folder} holds {len(found)} images ({', '.join(SUFFIXES)}); it must hold {n}")
    return found


def _read_image(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """An image file as (h, w, 3) uint8, resized where it is larger."""
    height, width, _ = shape
    try:
        image = read_image(path, FORMATS)
    except UnreadableImage as error:
        raise DataError(f"miniimagenet: {error}") from error
    if image.width < width or image.height < height:
        size = f"{image.width}x{image.height}"
        raise DataError(f"miniimagenet: {path} has {size} pixels; it must have {width}x{height} or more")
    same = image.size == (width, height)
    return np.asarray(image if same else image.resize((width, height), Image.Resampling.LANCZOS))
