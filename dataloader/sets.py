"""Raw sets opened for a benchmark: their content order, and what a summary has to say about them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataloader.images import content
from dataloader.images.cache import SPECS
from dataloader.images.raw import load_raw
from gradproj.errors import InputError


class Part(NamedTuple):
    """Training or test images as stored, and the order in which to use them."""

    images: np.ndarray  # (n, h, w[, 3]) uint8, perhaps memory-mapped
    labels: np.ndarray  # (n,) int64
    order: np.ndarray  # (n,) positions, see content.content_order

    def rows_of(self, classes: Iterable[int]) -> np.ndarray:
        """Positions of the images of some classes, in content order."""
        return self.order[np.isin(self.labels[self.order], list(classes))]


class OpenSet(NamedTuple):
    """A data set ready to be cut into tasks."""

    train: Part
    test: Part


class Opened(NamedTuple):
    """All that a benchmark needs to know about its images."""

    sets: dict[str, OpenSet]
    sources: dict[str, dict[str, Any]]
    notes: tuple[str, ...]


def open_sets(names: Iterable[str], data: str, data_dir: str | Path) -> Opened:
    """Open data sets, put them in content order and describe them.

    Args:
        names: of data sets, see `raw.NAMES`.
        data: "real", or "embedded" for rendered stand-ins that need no download.
        data_dir: where the array cache is, or goes.
    Returns:
        the sets; per set its image counts, checksum and whether that is the published set's (None: not known here);
        notes on what is missing.
    Raises:
        InputError: unknown `data` or name.
        DataError: images are missing or damaged.
    """
    if data not in ("real", "embedded"):
        raise InputError(f"unknown data {data!r}; known are real, embedded")
    sets, sources, notes = {}, {}, []
    for name in dict.fromkeys(names):
        sets[name], sources[name] = _open_set(name, data, data_dir)
        if data == "real":
            notes += _incomplete(name, sets[name])
    return Opened(sets, sources, tuple(notes))


def _open_set(name: str, data: str, data_dir: str | Path) -> tuple[OpenSet, dict[str, Any]]:
    if data == "embedded":
        from dataloader.embedded.render import load_raw as load  # Pillow and fonts are needed for embedded data only
    else:
        load = load_raw
    raw = load(name, data_dir)
    train_digests, test_digests = content.image_digests(raw.train_images), content.image_digests(raw.test_images)
    opened = OpenSet(
        Part(raw.train_images, raw.train_labels, content.digest_order(train_digests, raw.train_labels)),
        Part(raw.test_images, raw.test_labels, content.digest_order(test_digests, raw.test_labels)),
    )
    train_checksum = content.digest_checksum(train_digests, raw.train_labels)
    test_checksum = content.digest_checksum(test_digests, raw.test_labels)
    if name == "notmnist":
        digests = np.concatenate([train_digests, test_digests])
        labels = np.concatenate([raw.train_labels, raw.test_labels])
        verified = content.digest_checksum(digests, labels) == content.KNOWN_NOTMNIST
    else:
        verified = content.KNOWN[name] == (train_checksum, test_checksum) if name in content.KNOWN else None
    return opened, {
        "data": data,
        "train": len(raw.train_labels),
        "test": len(raw.test_labels),
        "train_sha256": train_checksum,
        "test_sha256": test_checksum,
        "verified": verified,
    }


def _incomplete(name: str, opened: OpenSet) -> list[str]:
    spec = SPECS[name]
    counts = (("training", len(opened.train.labels), spec.n_train), ("test", len(opened.test.labels), spec.n_test))
    return [f"{name}: {found:,} of {full:,} {part} images" for part, found, full in counts if found != full]
