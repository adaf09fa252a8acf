"""Characters drawn as grey masks, in the fonts that matplotlib ships."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Fonts that hold every character drawn here, and more that hold Latin letters and digits.
BROAD = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSansMono-Bold")
LATIN = (*BROAD, "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "STIXGeneral", "STIXGeneralBol", "cmr10")


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    # The basic layout engine is in every build of Pillow; the other one is not.
    return ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)


def draw(
    character: str,
    side: int,
    n: int,
    generator: np.random.Generator,
    *,
    sizes: tuple[int, int],
    tilt: float,
    shift: int,
) -> np.ndarray:
    """Draw one character n times, each time in another font, size, slant, angle and place.

    Args:
        character: a single one; letters and digits of ASCII come in more fonts than the rest.
        side: height and width of an image.
        n: how many.
        generator: decides everything that varies.
        sizes: smallest and largest height in pixels.
        tilt: largest rotation and slant, in radians.
        shift: largest distance from the centre along either axis, in pixels.
    Returns:
        (n, side, side) float32 in [0, 1], 1 where ink is.
    """
    names = LATIN if character.isascii() else BROAD
    masks = np.empty((n, side, side), dtype=np.float32)
    for i in range(n):
        font = names[generator.integers(len(names))]
        height = generator.uniform(*sizes)
        angle, slant = generator.uniform(-tilt, tilt, size=2)
        offset = generator.uniform(-shift, shift, size=2)
        large = _upright(character, font)
        # Pillow asks for the map from the new image to the old one: undo the shift, rotate, slant and scale.
        scale = _INK / height
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        a, b, c, d = cos, sin + slant * cos, -sin, cos - slant * sin
        x, y = (side - 1) / 2 + offset
        coefficients = (a, b, _LARGE / 2 - a * x - b * y, c, d, _LARGE / 2 - c * x - d * y)
        small = large.transform((side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        masks[i] = np.asarray(small, dtype=np.float32) / 255
    return masks


_LARGE, _INK = 64, 36  # pixels of the upright image, and of the larger side of the ink in it


@cache
def _upright(character: str, font_name: str) -> Image.Image:
    """The character, centred in a _LARGE x _LARGE image, its ink _INK pixels along the larger side."""
    left, top, right, bottom = _font(font_name, 100).getbbox(character)
    font = _font(font_name, max(round(100 * _INK / max(right - left, bottom - top)), 1))
    left, top, right, bottom = font.getbbox(character)
    image = Image.new("L", (_LARGE, _LARGE))
    ImageDraw.Draw(image).text(
        ((_LARGE - left - right) / 2, (_LARGE - top - bottom) / 2), character, fill=255, font=font
    )
    return image
