"""Checkpoints: the newest complete state of a run, with the one before it in reserve."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from gradproj.errors import InputError
from gradproj.files import load_tensors, save_tensors

NEXT, NEWEST, RESERVE = "checkpoint-next.pt", "checkpoint.pt", "checkpoint-previous.pt"  # NEXT only while saving


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a state; whatever happens meanwhile, a complete one stays on disk.

    Raises:
        InputError: the folder cannot be written to, or the disk is full.
    """
    save_tensors(folder / NEXT, state)  # complete before an older one is given up: the newest of those may be damaged
    try:
        if (folder / NEWEST).exists():
            (folder / NEWEST).replace(folder / RESERVE)
        (folder / NEXT).replace(folder / NEWEST)
    except OSError as error:
        raise InputError(f"cannot write {folder / NEWEST}: {error.strerror or error}") from error


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest state that can be read, or None. A damaged one is passed over with a warning."""
    damaged = 0
    for name in (NEXT, NEWEST, RESERVE):
        if (folder / name).exists():
            try:
                return load_tensors(folder / name)
            except InputError as error:
                damaged += 1
                warnings.warn(f"{error}; looking for an older state", stacklevel=2)
    if damaged:
        warnings.warn(f"no state in {folder} can be read, so there is none to go on from", stacklevel=2)
    return None


def remove_checkpoint(folder: Path) -> None:
    """Forget all states."""
    for name in (NEXT, NEWEST, RESERVE):
        (folder / name).unlink(missing_ok=True)
