"""Files that are whole or not there: written to a temporary name, flushed, renamed; verified before use."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gradproj.errors import InputError

TEMPORARY = ".tmp"  # the end of a temporary name
MAGIC = b"gpm-tensors 1\n"  # name and version of the format


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Let `write` fill a file that appears under `path` complete or not at all.

    Raises:
        InputError: the folder cannot be written to, or the disk is full; an older file at `path` is left as it was.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with suppress(OSError):  # renamed already, or on a file system that became read-only
                temporary.unlink()


def save_tensors(path: Path, value: Any) -> None:
    """Save tensors in dicts and lists, behind a format version and a checksum."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    payload = buffer.getbuffer()
    digest = hashlib.sha256(payload).hexdigest().encode()
    write_atomically(path, lambda file: (file.write(MAGIC), file.write(digest + b"\n"), file.write(payload)))


def is_ours(path: Path) -> bool:
    """Whether a file begins as one of `save_tensors` does."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def load_tensors(path: Path) -> Any:
    """Read what `save_tensors` wrote, onto the CPU, unpickling tensors and plain values only.

    Raises:
        InputError: the file is missing, unreadable, of another format or damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if not content.startswith(MAGIC):
        raise InputError(f"{path} is damaged or not of this program's format: it should begin with {MAGIC!r}")
    digest, _, payload = content[len(MAGIC) :].partition(b"\n")
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise InputError(f"{path} is damaged: its checksum does not match its content")
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
