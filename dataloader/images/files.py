"""Image files as 8-bit RGB, by Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gradproj.errors import one_line

Image.init()
SUFFIXES = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}


class UnreadableImage(Exception):
    """A file that is no image, or a damaged one."""


def read_image(path: str | Path, formats: Sequence[str] | None = None) -> Image.Image:
    """An image file as 8-bit RGB: 16 bits are brought to 8, what is transparent is laid on white.

    Args:
        path: of the file; of an animation the first picture is taken.
        formats: Pillow's names of those that it may have; all where not given.
    Raises:
        UnreadableImage: it is damaged, too large, or has 32-bit pixels, whose range nobody knows.
    """
    try:
        with Image.open(path, formats=formats) as image:
            return _as_rgb(image)
    except UnreadableImage as error:
        raise UnreadableImage(f"{path} {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they stumble over
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
