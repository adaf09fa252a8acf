"""A run's folder: its name, who holds it, and what can be read back from it."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
from torch import nn

from engine.checkpoint import NEWEST, NEXT, load_checkpoint
from engine.files import remove_leftovers
from engine.method import Method
from engine.options import Options, variant
from gradproj.errors import InputError
from gradproj.files import is_ours
from gradproj.memory import GradientProjectionMemory
from gradproj.normalization import Statistics
from methods import make_method
from report.runs import Run, read_run

LOCK, HOLDER = ".lock", ".holder"
FILES = ("config.json", "epochs.jsonl", NEXT, "summary.json", "accuracy.csv", "accuracy.png", "memory.png")


def run_folder(options: Options, benchmark: str, data: str) -> Path:
    """The folder named explicitly, or runs/DATA/BENCHMARK/METHOD/VARIANT/seed-N."""
    if options.run_folder is not None:
        return Path(options.run_folder)
    return Path(options.output_dir, data, benchmark, options.method, variant(options), f"seed-{options.seed}")


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
        yield
    finally:
        with suppress(OSError):  # the folder may have become read-only, and what that stopped is reported already
            (folder / HOLDER).unlink()
        lock.release()


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None where there is none or it is damaged."""
    run = read_run(folder / "summary.json")
    return run.summary if isinstance(run, Run) else None


def check_same_run(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise InputError, naming the differences, where a folder holds a run with other hyperparameters.

    Args:
        folder: for the message.
        found, wanted: hyperparameters that affect results, by name.
    """
    different = [
        f"{name} {found.get(name)} there, {wanted.get(name)} here"
        for name in sorted(found.keys() | wanted.keys())
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


@dataclass(frozen=True)
class LoadedRun:
    """What a run left behind, for inference and analysis.

    Attributes:
        model: with the weights of its end (or last checkpoint), in eval mode, on the CPU.
        method: as it was then. Some test with more than the model: `with run.method.testing(t): run.model(images, t)`.
        memory: the model's bases; None for methods without.
        config: the content of config.json.
        summary: the content of summary.json; None while the run is unfinished.
        statistics: with `--batchnorm task`, by task what `fixed_statistics(model, statistics[t])` of
            `gradproj.normalization` needs to test as the run did; else empty.
    """

    model: nn.Module
    method: Method
    memory: GradientProjectionMemory | None
    config: dict[str, Any]
    summary: dict[str, Any] | None
    statistics: list[Statistics]


def load_run(folder: str | Path, model: nn.Module | None = None) -> LoadedRun:
    """Read a run folder.

    Args:
        folder: with config.json and a checkpoint.
        model: of the run's architecture; needed only where its class cannot be imported or does not say in
            `arguments` what it was made with.
    Raises:
        InputError: a file is missing or damaged, or the model cannot be made.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        description = config["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'} is not the config.json of a run: {error!r}") from error
    state = load_checkpoint(folder)
    if state is None:
        raise InputError(f"{folder} has no checkpoint that can be read, so its weights are not there")
    model = make_model(description) if model is None else model
    names = {field.name for field in dataclasses.fields(Options)}
    method = make_method(model, Options(**{k: v for k, v in state["hyperparameters"].items() if k in names}))
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"the weights in {folder} are not of a {type(model).__name__} like this: {reason}") from error
    method.load_state_dict(state["method"])
    return LoadedRun(model.eval(), method, method.memory, config, read_summary(folder), state["statistics"])


def describe_model(model: nn.Module) -> dict[str, Any]:
    """What `make_model` needs to build the model again."""
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "arguments": getattr(model, "arguments", None),
    }


def make_model(description: dict[str, Any]) -> nn.Module:
    """A model from its class and constructor arguments."""
    try:
        module, _, name = description["class"].rpartition(".")
        made = getattr(importlib.import_module(module), name)(**description["arguments"])
    except (ImportError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"cannot build the model {description} ({error!r}); give load_run the model") from error
    if not isinstance(made, nn.Module):
        raise InputError(f"{description['class']} is not a model")
    return made
