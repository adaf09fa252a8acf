"""Six ways to turn a mask of ink into an image, as different from each other as the sets of 5-datasets are.

Every painter takes masks (n, side, side) float32 in [0, 1] and a generator, and returns (n, side, side) grey or
(n, side, side, 3) colour images, float, of which only [0, 1] is to be kept.
"""

from __future__ import annotations

import numpy as np

NOISE = 0.05  # standard deviation; white is 1
HAZE = 0.07  # of `haze`


def chalk(masks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """White on black, like MNIST."""
    ink = _each(generator, masks, 0.75, 1.0)
    return _only_ink_is_noisy(masks * ink, generator)


def print_(masks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Crisp white on black or dark grey, like notMNIST."""
    sharp = ((masks - 0.5) * 3 + 0.5).clip(0, 1)
    page = _each(generator, masks, 0.0, 0.35)
    return page + (1 - page) * sharp


def cloth(masks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Woven grey shapes on black, like Fashion-MNIST."""
    weave = 0.65 + 0.35 * _stripes(generator, masks, (0.0, np.pi), (0.2, 0.45))
    return _only_ink_is_noisy(masks * weave, generator)


def sign(masks: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Low-contrast digits on a shaded wall, a piece of the digit's twin at the side, like SVHN."""
    n, side, _ = masks.shape
    wall = generator.uniform(0.25, 0.75, size=(n, 1, 1, 3))
    direction = np.where(wall.mean(axis=3, keepdims=True) > 0.5, -1.0, 1.0)
    ink = wall + direction * generator.uniform(0.3, 0.5, size=(n, 1, 1, 1))
    shade = generator.uniform(-0.15, 0.15, size=(n, 1, 1, 1)) * np.linspace(-1, 1, side)[:, None, None]
    neighbour = np.roll(masks[generator.permutation(n)], side * 2 // 3, axis=2)
    neighbour[:, :, : side * 2 // 3] = 0
    cover = np.maximum(masks, 0.8 * neighbour)[..., None]
    return _noisy(wall + shade + cover * (ink - wall), generator)


def scene(
    masks: np.ndarray, generator: np.random.Generator, *, palette: int, n_palettes: int, accent: int
) -> np.ndarray:
    """A coloured shape before a striped ground, like CIFAR in that colour and texture tell much, but not all.

    Args:
        palette: 0 to n_palettes - 1; decides the ground's colour and the width of its stripes.
        n_palettes: how many there are to be told apart.
        accent: 0 to 4; decides the shape's usual colour and the stripes' usual direction, with much overlap.
    """
    angle = np.pi * accent / 5
    ground, ground_hue = _striped(masks, generator, palette, n_palettes, angles=(angle - 0.35, angle + 0.35))
    shape_hue = ground_hue + 0.3 + 0.1 * accent + generator.normal(0, 0.06, size=len(masks))
    shape = _colour(shape_hue, generator.uniform(0.75, 1.0, size=len(masks)))
    return _noisy(ground + masks[..., None] * (shape - ground), generator)


def haze(masks: np.ndarray, generator: np.random.Generator, *, palette: int, n_palettes: int) -> np.ndarray:
    """A faint shape of any colour before a striped ground, in noise: its form alone tells the class.

    Args:
        palette, n_palettes: as in `scene`.
    """
    ground, ground_hue = _striped(masks, generator, palette, n_palettes, angles=(0.0, np.pi))
    shape = _colour(ground_hue + generator.uniform(0.3, 0.8, size=len(masks)), generator.uniform(0.75, 1, len(masks)))
    strength = generator.uniform(0.5, 1.0, size=(len(masks), 1, 1, 1))
    picture = ground + strength * masks[..., None] * (shape - ground)
    return picture + generator.normal(0, HAZE, size=picture.shape)


def _striped(
    masks: np.ndarray, generator: np.random.Generator, palette: int, n_palettes: int, angles: tuple[float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """A striped ground (n, side, side, 3) and its hue (n,); the palette decides hue and width of the stripes."""
    hue = palette / n_palettes + generator.normal(0, 0.03, size=len(masks))
    width = 0.08 + 0.2 * (palette * 7 % n_palettes) / n_palettes  # neighbouring hues get different widths
    stripes = _stripes(generator, masks, angles, (width, width + 0.05))[..., None]
    return _colour(hue, generator.uniform(0.3, 0.6, size=len(masks))) * (0.8 + 0.2 * stripes), hue


def _each(generator: np.random.Generator, masks: np.ndarray, low: float, high: float) -> np.ndarray:
    return generator.uniform(low, high, size=(len(masks), 1, 1))


def _noisy(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return images + generator.normal(0, NOISE, size=images.shape)


def _only_ink_is_noisy(images: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Noise where the image is not black: the black around MNIST's digits is exact."""
    return np.where(images > 0.02, _noisy(images, generator), 0.0)


def _stripes(
    generator: np.random.Generator, masks: np.ndarray, angles: tuple[float, float], frequencies: tuple[float, float]
) -> np.ndarray:
    """(n, side, side) in [-1, 1]: waves along a random direction, frequencies in cycles per pixel."""
    n, side, _ = masks.shape
    angle, frequency = generator.uniform(*angles, size=(n, 1, 1)), generator.uniform(*frequencies, size=(n, 1, 1))
    phase = generator.uniform(0, 2 * np.pi, size=(n, 1, 1))
    y, x = np.mgrid[:side, :side]
    return np.sin(2 * np.pi * frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)


def _colour(hue: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Colours (n, 1, 1, 3) of given hue (any real, period 1) and brightness (n,), at saturation 0.6."""
    wheel = (hue[:, None] + np.array([0.0, 1 / 3, 2 / 3])) % 1
    strength = (2 - np.abs(wheel * 6 - 3)).clip(0, 1)  # 0 far from the primary, 1 near it
    return (value[:, None] * (0.4 + 0.6 * strength))[:, None, None, :]
