"""Checkpoints: the newest complete state of a run, with the one before it in reserve."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from gpm.errors import InputError
from gpm.files import load_tensors, save_tensors

NEWEST, RESERVE = "checkpoint.pt", "checkpoint-previous.pt"


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write a state; whatever happens meanwhile, a complete one stays on disk."""
    if (folder / NEWEST).exists():
        (folder / NEWEST).replace(folder / RESERVE)
    save_tensors(folder / NEWEST, state)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """The newest state that can be read, or None. A damaged one is passed over with a warning."""
    for name in (NEWEST, RESERVE):
        if (folder / name).exists():
            try:
                return load_tensors(folder / name)
            except InputError as error:
                warnings.warn(f"{error}; going back to an older state", stacklevel=2)
    return None


def remove_checkpoint(folder: Path) -> None:
    """Forget all states."""
    for name in (NEWEST, RESERVE):
        (folder / name).unlink(missing_ok=True)
