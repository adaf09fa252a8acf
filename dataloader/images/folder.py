"""Image files of your own, in a folder for each class."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from dataloader.images.files import SUFFIXES, read_image
from engine.torchvision import import_torchvision
from gradproj.errors import InputError, one_line

datasets = import_torchvision("datasets")


def image_folder(folder: str | Path, transform: Any) -> tuple[Dataset, Dataset | None]:
    """The images of a folder with one folder for each class, or with two such folders `train` and `test`.

    Args:
        folder: of image files that Pillow reads, by their suffixes (see `read_image`). Hidden ones do not count.
        transform: makes a tensor of an image; torchvision's.
    Returns:
        training and test images; no test images where the folder is not divided.
    Raises:
        InputError: there is no such folder, it has no images, or an image is in it twice.
    """
    folder = Path(folder)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        parts = [_images_in(folder / part, transform) for part in ("train", "test")]
        _refuse_twice([path for part in parts for path, _ in part.samples])
        beside = sorted(p.name for p in folder.glob("[!.]*") if p.is_dir() and p.name not in ("train", "test"))
        if beside:
            warnings.warn(f"{folder}: train and test are read, {', '.join(beside)} beside them is not", stacklevel=2)
        return parts[0], parts[1]
    found = _images_in(folder, transform)
    _refuse_twice([path for path, _ in found.samples])
    return found, None


def _images_in(folder: Path, transform: Any) -> Any:
    """Folders without images, such as those that editors leave, are no classes."""
    others: dict[str, int] = {}  # files that are left out, by suffix

    def counts(path: str) -> bool:
        suffix = Path(path).suffix.lower()
        if any(part.startswith(".") for part in Path(path).relative_to(folder).parts):  # as editors and archives leave
            return False
        if suffix in SUFFIXES and Path(path).is_file():
            return True
        kind = "links to nothing" if suffix in SUFFIXES else suffix or "no suffix"
        others[kind] = others.get(kind, 0) + 1
        return False

    try:
        found = datasets.ImageFolder(str(folder), transform, loader=read_image, is_valid_file=counts, allow_empty=True)
        if not len(found):
            raise OSError("there are none in its folders")
    except (OSError, RuntimeError) as error:  # RuntimeError: of older versions
        reason = one_line(error)
        raise InputError(f"no images in {folder} ({reason}); it must hold a folder of images for each class") from error
    if others:
        listed = ", ".join(f"{n} of {suffix}" for suffix, n in sorted(others.items()))
        warnings.warn(f"{folder}: files that are no images are left out ({listed})", stacklevel=3)
    filled = {label for _, label in found.samples}
    found.name = str(folder)
    found.classes = [name if label in filled else "" for label, name in enumerate(found.classes)]
    return found


def _refuse_twice(paths: list[str]) -> None:
    """Raise InputError where two paths are one file, as links make them: it would be trained on and tested."""
    first: dict[str, str] = {}
    for path in paths:
        if (other := first.setdefault(os.path.realpath(path), path)) is not path:
            raise InputError(f"{other} and {path} are the same image; take one of the links away")
