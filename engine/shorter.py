"""A run with more tasks goes on from one with fewer whose options are otherwise the same: tomorrow there is another."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from engine import fingerprint
from engine.folder import NEWEST, keep_weights, load_checkpoint, run_folder, weights_after
from engine.method import Method
from engine.run_tasks import RunTasks
from engine.same import changed_sets, method_difference, plain
from engine.state import of_network
from engine.task import Benchmark
from gradproj.errors import InputError

State = dict[str, Any]


def from_shorter(
    folder: Path, wanted: State, method: Method, benchmark: Benchmark, tasks: RunTasks
) -> tuple[State | None, list[str]]:
    """The state from which a run can go on that differs from a finished or stopped one by more tasks alone.

    The shorter run stays as it is.

    Args:
        folder: of the run, which gets the weights that the shorter one kept, with --keep each.
        wanted: what the run's state would be before its first task.
        method: of the run.
        benchmark: of the run.
        tasks: of the run; those that the shorter one has seen are built, to see that they are the same.
    Returns:
        the state, None where there is no such run; and what to say.
    """
    notes = []
    for shorter in shorter_runs(method, benchmark):
        try:
            state = load_checkpoint(shorter)
        except InputError as error:  # it may not be read
            notes.append(f"note: the shorter run in {shorter} is not continued: {error}")
            continue
        if state is None:
            continue
        if reason := why_not(state, wanted, method, tasks):
            notes.append(f"note: the shorter run in {shorter} is not continued: {reason}")
            continue
        if method.options.keep == "each":
            for t in range(state["position"]):
                if (weights := weights_after(t, shorter, state)) is not None:
                    keep_weights(folder, t, with_new(weights, wanted["model"]))
        state = lengthened(state, shorter, wanted, method.options.n_tasks)
        notes.append(f"continued from {shorter}, where {state['position']} of the tasks are learned")
        if state["position"] and not state["first"]:
            notes.append("note: no interference, since the network after the first task was not kept (--keep each)")
        return state, notes
    return None, notes


def shorter_runs(method: Method, benchmark: Benchmark) -> list[Path]:
    """Folders of runs that differ from one in having fewer tasks alone, the longest first."""
    options, kind = method.options, type(method)
    if options.run_folder is not None:
        return []
    found = []
    folder = run_folder(options, kind, benchmark.name, benchmark.data)
    for checkpoint in folder.parent.parent.glob(f"*/{folder.name}/{NEWEST}"):
        try:
            config = json.loads((checkpoint.parent / "config.json").read_text(encoding="utf-8"))
            n_tasks = int(config["hyperparameters"]["n_tasks"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        same = run_folder(replace(options, n_tasks=n_tasks), kind, benchmark.name, benchmark.data) == checkpoint.parent
        if n_tasks < options.n_tasks and same:
            found.append((n_tasks, checkpoint.parent))
    return [path for _, path in sorted(found, reverse=True)]


def why_not(state: State, wanted: State, method: Method, tasks: RunTasks) -> str:
    """What keeps a run from going on from a shorter one; empty if nothing does.

    Args:
        state: the shorter run's checkpoint.
        wanted: what this run's would be before its first task.
        method: this run's.
        tasks: this run's; those that the shorter one has seen are built.
    """
    if method.joint or method.knows_n_tasks:
        return f"what {method.name} learns depends on the number of tasks"
    if not state.get("initial"):
        return "it is of an older version, which did not record what it was made of"
    if different := method_difference(state, wanted):
        return f"it is of another method: {different}"
    there, here = ({**plain(s["hyperparameters"]), "n_tasks": None} for s in (state, wanted))
    if there != here:
        return "its hyperparameters are others"
    if changed := changed_sets(state["sources"], wanted["sources"]):
        return f"its images of {', '.join(changed)} are others"
    if different := _network_difference(state, wanted["network"], method):
        return f"its network is another one: {different}"
    begun_otherwise = [name for name, value in state["initial"].items() if wanted["initial"][name] != value]
    if begun_otherwise:
        return f"its network began with other weights {begun_otherwise[0]}"
    return tasks.difference(state["tasks"])


def _network_difference(state: State, network: Mapping[str, Any], method: Method) -> str:
    """What differs between a shorter run's network and this one's beside modules of later tasks alone."""
    n_tasks, found = state["hyperparameters"]["n_tasks"], state["network"]
    later = {id(inner) for modules in method.task_modules[n_tasks:] for module in modules for inner in module.modules()}
    prefixes = tuple(f"{name}." for name, module in method.model.named_modules() if id(module) in later)
    known = {
        kind: {k: v for k, v in network[kind].items() if k in found[kind] or not f"{k}.".startswith(prefixes)}
        for kind in ("weights", "modules")
    }
    return fingerprint.network_difference(found, {**network, **known})


def lengthened(state: State, folder: Path, wanted: State, n_tasks: int) -> State:
    """A shorter run's state as that of this one: with later tasks' modules as they begin, and room for more accuracies.

    Args:
        state: of the shorter run.
        folder: of the shorter run.
        wanted: what this run's state would be before its first task.
        n_tasks: of this run.
    """
    there = of_network(state["model"]).keys()

    def filled(value: Any, begun: Any) -> Any:
        """The same with the new modules in every dict with a tensor for each weight, such as a copy of the network: as
        what the longer run would have begun with in that place has them, else as the network begins."""
        if isinstance(value, dict):
            parts = begun if isinstance(begun, dict) else {}
            if there <= value.keys():
                return with_new(value, parts if there <= parts.keys() else wanted["model"])
            return {name: filled(part, parts.get(name)) for name, part in value.items()}
        if isinstance(value, list):
            parts = begun if isinstance(begun, list) and len(begun) == len(value) else [None] * len(value)
            return [filled(part, before) for part, before in zip(value, parts, strict=True)]
        return value

    rows = {part: [[*row, *[None] * (n_tasks - len(row))] for row in rows] for part, rows in state["accuracy"].items()}
    first = state["first"] or of_network(weights_after(0, folder, state) or {})  # a finished run lets it go
    known = state.get("frozen", [name for name in wanted["frozen"] if name in there])  # older versions did not say
    frozen = [*known, *(name for name in wanted["frozen"] if name not in there)]
    made_of = {name: wanted[name] for name in ("network", "initial")} | {"frozen": frozen}
    return filled({**state, "first": first}, wanted) | made_of | {"accuracy": rows, "interference": None}


def with_new(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A shorter run's weights and, where it has none, this one's at its beginning, in this network's order."""
    return {name: weights.get(name, value) for name, value in of_network(own).items()} | weights
