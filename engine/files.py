"""Text files that are whole or not there, and what a killed process left of one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gradproj.files import TEMPORARY, write_atomically


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Delete what killed processes left half written of some files in a folder that nobody else writes to now."""
    for name in names:
        for path in folder.glob(f".{name}.*{TEMPORARY}"):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, whole or not at all."""
    write_text(path, json.dumps(value, indent=1) + "\n")
