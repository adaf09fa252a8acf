"""Finished runs read from any set of folders; unfinished, diverged and damaged ones listed beside them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from engine.folder import DIVERGED
from engine.record import load_summary
from gradproj.errors import InputError

# Hyperparameters of the machine a run was made on, nobody else's.
LOCAL_ONLY = ("data_dir", "output_dir", "run_folder", "images", "tasks", "quiet")


class Run(NamedTuple):
    """A finished run."""

    path: Path
    summary: dict[str, Any]


class Problem(NamedTuple):
    """A run that gives no numbers, or a path where there is none."""

    path: Path
    status: str  # "unfinished", "diverged", "damaged" or "missing"
    reason: str


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[Problem]]:
    """All runs at or under some paths.

    Args:
        paths: run folders, folders that hold them at any depth, or summary files.
    Returns:
        finished runs; and those that are unfinished, diverged or damaged, and paths without any; each in path order.
    Raises:
        InputError: there is no run under any of them.
    """
    runs, problems = {}, {}
    for path in paths:
        if not path.exists():
            problems[path.resolve()] = Problem(path, "missing", "does not exist")
            continue
        found, closed = set(), []
        for file in [path] if path.is_file() else _files_below(path, closed):
            if file.name == "config.json":
                found.add(file.parent / "summary.json")  # which may not exist yet
            elif file == path or file.name == "summary.json" or file.name.startswith("seed-"):
                found.add(file)
        for error in closed:
            folder = Path(error.filename)
            problems[folder.resolve()] = Problem(folder, "missing", f"cannot be entered: {error.strerror}")
        if not found and not closed:
            problems[path.resolve()] = Problem(path, "missing", "no summary.json, config.json or seed-N.json")
        for file in found:
            outcome = read_run(file)
            (runs if isinstance(outcome, Run) else problems)[file.resolve()] = outcome
    if problems and not runs and all(problem.status == "missing" for problem in problems.values()):
        nothing = "; ".join(f"{problem.path}: {problem.reason}" for problem in problems.values())
        raise InputError(f"{nothing}; give run folders, or a folder that holds them")
    return sorted(runs.values(), key=lambda run: str(run.path)), sorted(problems.values(), key=lambda p: str(p.path))


def _files_below(folder: Path, closed: list[OSError]) -> Iterator[Path]:
    """All JSON files below a folder; of folders that may not be entered, the errors are added to `closed`."""
    for place, _, names in os.walk(folder, onerror=closed.append):
        yield from (Path(place, name) for name in names if name.endswith(".json"))


def read_run(file: Path) -> Run | Problem:
    """The run that a summary file describes; the file need not exist where a run has only begun."""
    folder = file.parent if file.name == "summary.json" else file
    summary, fault = load_summary(file) if file.exists() else ({"finished": False}, "")
    if fault:
        return Problem(folder, "damaged", f"{file.name}: {fault}")
    if not summary["finished"] and (reason := divergence_of(folder)):
        return Problem(folder, "diverged", reason)
    if not summary["finished"]:
        return Problem(
            folder, "unfinished", f"{position_of(folder) or 'no summary.json'}; the same command continues it"
        )
    return Run(folder, summary)


def divergence_of(folder: Path) -> str:
    """Where a run's loss stopped being finite; empty where it did not."""
    try:
        return " ".join((folder / DIVERGED).read_text(encoding="utf-8", errors="replace").split())
    except OSError:
        return ""


def position_of(folder: Path) -> str:
    """How far an unfinished run has come, as its folder tells; empty where it tells nothing."""
    try:
        lines = (folder / "epochs.jsonl").read_text(encoding="utf-8").splitlines()
        first, last = json.loads(lines[0]), json.loads(lines[-1])
        n_tasks = json.loads((folder / "config.json").read_text(encoding="utf-8"))["hyperparameters"]["n_tasks"]
        if first["task"] > 0:  # all tasks are learned together
            return f"begun: epoch {last['epoch']}"
        return f"begun: task {last['task'] + 1}/{n_tasks}, epoch {last['epoch']}"
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return ""
