"""Image files of your own, in a folder for each class."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from engine.torchvision import import_torchvision
from gradproj.errors import InputError, one_line

datasets = import_torchvision("datasets")
Image.init()
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def image_folder(folder: str | Path, transform: Any) -> tuple[Dataset, Dataset | None]:
    """The images of a folder with one folder for each class, or with two such folders `train` and `test`.

    Args:
        folder: of image files that Pillow reads, by their suffixes; of animations the first picture. 16-bit ones are
            brought to 8 bits, transparent ones laid on white.
        transform: makes a tensor of an image; torchvision's.
    Returns:
        training and test images; no test images where the folder is not divided.
    Raises:
        InputError: there is no such folder, or it has no images.
    """
    folder = Path(folder)
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        return _images_in(folder / "train", transform), _images_in(folder / "test", transform)
    return _images_in(folder, transform), None


def _images_in(folder: Path, transform: Any) -> Dataset:
    """Folders without images, such as those that editors leave, are no classes."""
    others: dict[str, int] = {}  # files that are left out, by suffix

    def counts(path: str) -> bool:
        suffix = Path(path).suffix.lower()
        if suffix not in SUFFIXES and not Path(path).name.startswith("."):
            others[suffix or "no suffix"] = others.get(suffix or "no suffix", 0) + 1
        return suffix in SUFFIXES

    try:
        found = datasets.ImageFolder(str(folder), transform, loader=read_image, is_valid_file=counts, allow_empty=True)
        if not len(found):
            raise OSError("there are none in its folders")
    except (OSError, RuntimeError) as error:  # RuntimeError: of older versions
        reason = one_line(error)
        raise InputError(f"no images in {folder} ({reason}); it must hold a folder of images for each class") from error
    if others:
        listed = ", ".join(f"{n} of {suffix}" for suffix, n in sorted(others.items()))
        warnings.warn(f"{folder}: files that are no images by their suffix are left out ({listed})", stacklevel=3)
    filled = {label for _, label in found.samples}
    found.name = str(folder)
    found.classes = [name if label in filled else "" for label, name in enumerate(found.classes)]
    return found


class UnreadableImage(Exception):
    """A file that is no image, or a damaged one."""


def read_image(path: str | Path) -> Image.Image:
    """An image file as 8-bit RGB.

    Raises:
        UnreadableImage: it is damaged, too large, or has 32-bit pixels, whose range nobody knows.
    """
    try:
        with Image.open(path) as image:
            return _as_rgb(image)
    except UnreadableImage as error:
        raise UnreadableImage(f"{path} {error}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # as Pillow's decoders raise
        raise UnreadableImage(f"cannot read {path} ({one_line(error)}); replace it or take it away") from error


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        eight = (np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8)
        return Image.fromarray(eight).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImage("has 32-bit pixels, whose range nobody knows; save it with 8 or 16 bits")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
