"""A run's folder: its name, who holds it, and its checkpoints: the newest complete state, and the one before it."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
from torch import Tensor

from engine.distributed import own_folder, share_files
from engine.files import remove_leftovers
from engine.options import MethodType, Options, variant
from gradproj.errors import InputError
from gradproj.files import is_ours, load_tensors, save_tensors

NEXT, NEWEST, RESERVE = "checkpoint-next.pt", "checkpoint.pt", "checkpoint-previous.pt"  # NEXT only while saving
LOCK, HOLDER = ".lock", ".holder"
TASK_WEIGHTS = "weights-{}.pt"  # of the network after a task, numbered from 0, with --keep each
DIVERGED = "divergence.txt"
OUTPUTS = ("config.json", "epochs.jsonl", "summary.json", "accuracy.csv", "accuracy.png", "memory.png", DIVERGED)


def run_folder(options: Options, method: MethodType, benchmark: str, data: str) -> Path:
    """The folder named explicitly, or runs/DATA/BENCHMARK/METHOD/VARIANT/seed-N."""
    if options.run_folder is not None:
        return own_folder(Path(options.run_folder))
    names = (data, benchmark, method.name, variant(options, method), f"seed-{options.seed}")
    return own_folder(Path(options.output_dir, *names))


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes from running in the same folder.

    Raises:
        InputError: one does already, the folder is another program's, or it cannot be written to.
    """
    if foreign := foreign_files(folder):
        raise InputError(f"{folder} holds {', '.join(foreign)} of another program; choose another folder")
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        (folder / HOLDER).write_text(f"process {os.getpid()} on {platform.node()}", encoding="utf-8")
        remove_leftovers(folder, (*OUTPUTS, NEXT, TASK_WEIGHTS.format("*")))
    except filelock.Timeout as error:
        holder = (folder / HOLDER).read_text(encoding="utf-8") if (folder / HOLDER).exists() else "another process"
        raise InputError(f"{holder} is at work in {folder}; wait for it or choose another folder") from error
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    try:
        share_files(folder, (NEXT, NEWEST, RESERVE, "summary.json"))
        yield
    finally:
        with suppress(OSError):  # the folder may have become read-only, and what that stopped is reported already
            (folder / HOLDER).unlink()
            if made and {path.name for path in folder.iterdir()} == {LOCK}:  # the run was refused
                (folder / LOCK).unlink()
                for path in made:
                    path.rmdir()
        lock.release()


def foreign_files(folder: Path) -> list[str]:
    """Files that a run would write, in a folder where nothing says that a run wrote them."""
    states = (NEXT, NEWEST, RESERVE)
    there = [name for name in (*OUTPUTS, *states) if (folder / name).exists()]
    by_a_run = (folder / LOCK).exists() or any(is_ours(folder / name) for name in states)
    for name, key in (("config.json", "hyperparameters"), ("summary.json", "average_accuracy")):
        with suppress(OSError, ValueError, TypeError):
            by_a_run = by_a_run or key in json.loads((folder / name).read_text(encoding="utf-8"))
    return [] if by_a_run else there


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
    """The newest state that can be read, or None. A damaged one is passed over with a warning.

    Raises:
        InputError: one is there, and the system does not let it be read.
    """
    damaged = 0
    for name in (NEXT, NEWEST, RESERVE):
        if (folder / name).exists():
            try:
                return _upgraded(load_tensors(folder / name))
            except InputError as error:
                if isinstance(error.__cause__, OSError):  # not damaged: it may be read another time
                    raise InputError(f"{error}; nothing was changed") from error
                damaged += 1
                warnings.warn(f"{error}; looking for an older state", stacklevel=2)
    if damaged:
        warnings.warn(f"no state in {folder} can be read, so there is none to go on from", stacklevel=2)
    return None


def save_last(folder: Path, state: dict[str, Any]) -> None:
    """Write the state of a finished run, which stays alone."""
    save_checkpoint(folder, state)
    (folder / RESERVE).unlink(missing_ok=True)


def keep_weights(folder: Path, t: int, weights: dict[str, Tensor]) -> None:
    """Keep what training moved (Method.weights), as it is after task t."""
    save_tensors(folder / TASK_WEIGHTS.format(t), weights)


def weights_after(t: int, folder: Path, state: dict[str, Any]) -> dict[str, Tensor] | None:
    """What training moved, as it was after a task of a run; None where that was not kept.

    Args:
        t: the task.
        folder: of the run.
        state: its checkpoint.
    Raises:
        InputError: the file is damaged.
    """
    if t == state["position"] - 1 and state["task_progress"] is None:
        return state["model"]
    path = folder / TASK_WEIGHTS.format(t)
    return load_tensors(path) if path.exists() else None


def kept_weights(folder: Path) -> list[Path]:
    """The files with the weights after each task."""
    return [path for path in folder.glob(TASK_WEIGHTS.format("*")) if path.stem.rpartition("-")[2].isdecimal()]


def forget(folder: Path) -> None:
    """Remove all states, and the summary that says that a run is finished."""
    for path in (*(folder / name for name in (NEXT, NEWEST, RESERVE, "summary.json")), *kept_weights(folder)):
        path.unlink(missing_ok=True)


def leave_nothing(folder: Path) -> None:
    """Remove what a run writes before it has learned anything, where there is nothing else."""
    if not any((folder / name).exists() for name in (NEXT, NEWEST, RESERVE, "summary.json")):
        for name in ("config.json", "epochs.jsonl"):
            (folder / name).unlink(missing_ok=True)


def _upgraded(state: Any) -> Any:
    """A state of an older version, in which method gpm's own was that of its bases, as this one would have saved it."""

    def method(saved: dict[str, Any]) -> dict[str, Any]:
        return {"memory": saved} if {"bases", "n_updates"} <= saved.keys() else saved

    if not isinstance(state, dict) or "method" not in state:
        return state
    if (progress := state.get("task_progress")) is not None:
        state["task_progress"] = progress | {"method": method(progress["method"])}
    return state | {"method": method(state["method"])}
