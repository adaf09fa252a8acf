"""A run's folder: its name, who holds it, and its checkpoints: the newest complete state, and the one before it."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock

from engine.distributed import own_folder, share_files
from engine.files import remove_leftovers
from engine.options import MethodType, Options, variant
from gradproj.errors import InputError
from gradproj.files import is_ours, load_tensors, save_tensors

NEXT, NEWEST, RESERVE = "checkpoint-next.pt", "checkpoint.pt", "checkpoint-previous.pt"  # NEXT only while saving
LOCK, HOLDER = ".lock", ".holder"
# Flags of some methods, which older versions recorded in the runs of all.
ONCE_OF_EVERY_RUN = frozenset(
    "threshold threshold_step n_samples samples memory_images replay_batch ewc_lambda owm_alpha ogd_samples hat_smax "
    "hat_sparsity".split()
)
FILES = ("config.json", "epochs.jsonl", NEXT, "summary.json", "accuracy.csv", "accuracy.png", "memory.png")


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
    if (folder / NEWEST).exists() and not (folder / "config.json").exists() and not is_ours(folder / NEWEST):
        raise InputError(f"{folder} holds a {NEWEST} of another program; choose another folder")
    lock = filelock.FileLock(folder / LOCK, timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
        (folder / HOLDER).write_text(f"process {os.getpid()} on {platform.node()}")
        remove_leftovers(folder, FILES)
    except filelock.Timeout as error:
        holder = (folder / HOLDER).read_text() if (folder / HOLDER).exists() else "another process"
        raise InputError(f"{holder} is at work in {folder}; wait for it or choose another folder") from error
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another --output_dir") from error
    try:
        share_files(folder, (NEXT, NEWEST, RESERVE, "summary.json"))
        yield
    finally:
        with suppress(OSError):  # the folder may have become read-only, and what that stopped is reported already
            (folder / HOLDER).unlink()
        lock.release()


def check_same_run(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise InputError, naming the differences, where a folder holds a run with other hyperparameters.

    Args:
        folder: for the message.
        found, wanted: hyperparameters that affect results, by name.
    """
    different = [
        f"{name} {found.get(name)} there, {wanted.get(name)} here"
        for name in sorted((found.keys() - ONCE_OF_EVERY_RUN) | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if different:
        raise InputError(f"{folder} holds a run with other hyperparameters ({'; '.join(different)}); choose another")


def check_same_images(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise InputError where a folder holds a run on other images.

    Args:
        folder: for the message.
        found, wanted: by data set, its checksums (Benchmark.sources).
    """
    different = [
        name
        for name, source in wanted.items()
        for part in ("train_sha256", "test_sha256")
        if source.get(part) != found.get(name, {}).get(part)
    ]
    if different:
        raise InputError(
            f"{folder} holds a run on other images of {', '.join(dict.fromkeys(different))} than are there now; give "
            "those back, choose another --output_dir, or start afresh with --no_resume"
        )


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
                return _upgraded(load_tensors(folder / name))
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


def _upgraded(state: Any) -> Any:
    """A state of an older version, in which method gpm's own was that of its bases, as this one would have saved it."""

    def method(saved: dict[str, Any]) -> dict[str, Any]:
        return {"memory": saved} if saved.keys() == {"bases", "n_updates"} else saved

    if not isinstance(state, dict) or "method" not in state:
        return state
    if (progress := state.get("task_progress")) is not None:
        state["task_progress"] = progress | {"method": method(progress["method"])}
    return state | {"method": method(state["method"])}
