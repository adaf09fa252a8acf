"""Embedded data: rendered stand-ins for the published sets, so that everything runs with no download.

Each set has the name, image shape, classes and groups of classes of a published one, and nothing else of it: its images
are characters drawn by `glyphs` and painted by `paint`. Accuracies on them say that a program works, and how methods
compare on an easy problem; they are never results on the published benchmark.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from dataloader.embedded import paint
from dataloader.embedded.glyphs import draw
from dataloader.images import cache
from dataloader.images.cache import SPECS, RawSet, Spec
from dataloader.images.superclasses import SUPERCLASS_OF
from gradproj.errors import InputError

VERSION = 4  # of the images: raise it whenever a change here, in glyphs or in paint alters a pixel

# One string of five characters per superclass of CIFAR-100.
GROUPS = (
    *("ABCDE", "FGHJK", "LMNPQ", "RSTUV", "WXYZ&", "abdef", "ghkmn", "qrtyp", "02345", "6789#"),
    *("αβγδε", "ζηθλμ", "πστφψ", "ΓΔΘΛΞ", "ΠΣΦΨΩ", "♠♣♥♦★", "●■▲◆✚", "←↑→↓↔", "∀∃∈∑∫", "ЖДЮЯФ"),
)


class Recipe(NamedTuple):
    """How one set is made."""

    characters: str  # one per class
    sizes: tuple[int, int]  # smallest and largest height of a character, in pixels
    tilt: float  # radians
    shift: int  # pixels
    n_train: int  # images per class
    n_test: int
    painter: Callable[[int], Callable[[np.ndarray, np.random.Generator], np.ndarray]]  # of a class


def _characters_of_cifar100() -> str:
    """Fine class by fine class, the next unused character of its group."""
    left = [iter(group) for group in GROUPS]
    return "".join(next(left[superclass]) for superclass in SUPERCLASS_OF)


def _paint_superclass(fine: int) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    superclass = SUPERCLASS_OF[fine]
    return partial(paint.scene, palette=superclass, n_palettes=20, accent=SUPERCLASS_OF[:fine].count(superclass))


RECIPES = {
    "mnist": Recipe("0123456789", (16, 22), 0.25, 2, 600, 100, lambda c: paint.chalk),
    "fashion_mnist": Recipe("♠♣♥♦★●■▲◆✚", (18, 25), 0.3, 2, 600, 100, lambda c: paint.cloth),
    "notmnist": Recipe("ABCDEFGHIJ", (22, 28), 0.15, 1, 600, 100, lambda c: paint.print_),
    "cifar10": Recipe(
        "πΣΦλΩЖ∀ДЮ∫",
        (19, 26),
        0.2,
        3,
        300,
        60,
        lambda c: partial(paint.scene, palette=c // 5, n_palettes=2, accent=c % 5),
    ),
    # Ten consecutive classes, a task of the 10-split benchmark, share a ground, so that tasks differ more than classes.
    "cifar100": Recipe(
        _characters_of_cifar100(),
        (18, 25),
        0.2,
        3,
        120,
        30,
        lambda fine: partial(paint.haze, palette=fine // 10, n_palettes=10),
    ),
    "svhn": Recipe("0123456789", (18, 24), 0.1, 2, 300, 60, lambda c: paint.sign),
    # The same classes for the superclass benchmark: here those of one superclass share a ground.
    "cifar100_superclass": Recipe(_characters_of_cifar100(), (18, 25), 0.2, 3, 120, 30, _paint_superclass),
    # Large images, so few of them. Five consecutive classes, a task, share a ground.
    "miniimagenet": Recipe(
        "".join(GROUPS),
        (46, 66),
        0.2,
        8,
        40,
        12,
        lambda c: partial(paint.haze, palette=c // 5, n_palettes=20),
    ),
}


def spec(name: str) -> Spec:
    """What a set has to look like: as the published set it stands in for."""
    return SPECS[name.removesuffix("_superclass")]


def load_raw(name: str, data_dir: str | Path) -> RawSet:
    """The rendered stand-in of a published data set.

    Args:
        name: one of `RECIPES`.
        data_dir: rendered images are kept in its embedded/ folder if it can be written to.
    Returns:
        same shapes and types as the published set, fewer images.
    Raises:
        InputError: unknown name.
        DataError: kept images are damaged.
    """
    if name not in RECIPES:
        raise InputError(f"unknown data set {name!r}; known are {', '.join(RECIPES)}")
    folder = Path(data_dir) / "embedded" / f"{name}_v{VERSION}"
    if not cache.missing_files(folder):
        return cache.read_cache(folder, spec(name))
    raw = None
    with contextlib.suppress(OSError):  # a read-only folder costs seconds, not the run
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f".{name}.lock"):
            if cache.missing_files(folder):
                raw = render(name)
                cache.write_cache(folder, raw)
            return cache.read_cache(folder, spec(name))
    return raw or render(name)


def render(name: str) -> RawSet:
    """Make a set from scratch; the same bytes every time.

    Args:
        name: one of `RECIPES`.
    Returns:
        images in a random but fixed order.
    """
    recipe = RECIPES[name]
    number, side = list(RECIPES).index(name), spec(name).shape[0]
    parts = []
    for part, n in enumerate((recipe.n_train, recipe.n_test)):
        images = [_render_class(recipe, c, n, side, [VERSION, number, part, c]) for c in range(len(recipe.characters))]
        order = np.random.default_rng([VERSION, number, part]).permutation(n * len(images))
        parts += [np.concatenate(images)[order], np.repeat(np.arange(len(images)), n)[order]]
    return RawSet(*parts)


def _render_class(recipe: Recipe, c: int, n: int, side: int, seed: list[int]) -> np.ndarray:
    generator = np.random.default_rng(seed)
    character = recipe.characters[c]
    masks = draw(character, side, n, generator, sizes=recipe.sizes, tilt=recipe.tilt, shift=recipe.shift)
    painted = recipe.painter(c)(masks, generator)
    return np.rint(painted.clip(0, 1) * 255).astype(np.uint8)
