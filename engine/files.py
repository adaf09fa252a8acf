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
    """Write a JSON file, whole or not at all; a list of plain values, such as a row of a matrix, takes one line."""
    write_text(path, _as_json(value) + "\n")


def _as_json(value: Any, indent: str = "") -> str:
    inner = indent + " "
    if isinstance(value, dict) and value:
        parts = [f"{json.dumps(str(key))}: {_as_json(part, inner)}" for key, part in value.items()]
        return "{\n" + ",\n".join(inner + part for part in parts) + f"\n{indent}}}"
    if isinstance(value, (list, tuple)) and any(isinstance(part, (dict, list, tuple)) for part in value):
        return "[\n" + ",\n".join(inner + _as_json(part, inner) for part in value) + f"\n{indent}]"
    return json.dumps(value)


def refusal(error: OSError) -> str:
    """What the system refused, and of which file, in words."""
    return f"{error.filename}: {error.strerror}; give another place" if error.filename else f"cannot write: {error}"
