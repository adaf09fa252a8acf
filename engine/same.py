"""Whether a folder's run is this one: of the same hyperparameters, network, images and tasks; and of which code."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from engine import fingerprint
from engine.run_tasks import RunTasks
from gradproj.errors import InputError

# Flags of some methods, which older versions recorded in the runs of all.
ONCE_OF_EVERY_RUN = frozenset(
    "threshold threshold_step n_samples samples memory_images replay_batch ewc_lambda owm_alpha ogd_samples hat_smax "
    "hat_sparsity".split()
)
WAY_OUT = "choose another --output_dir, or start afresh with --no_resume"

State = Mapping[str, Any]


def check_same(folder: Path, found: State, wanted: State, tasks: RunTasks) -> None:
    """Raise InputError, saying what differs, where a folder holds another run. What it did not record is not compared.

    Args:
        folder: for the message.
        found: its checkpoint, or what `of_summary` gave.
        wanted: the checkpoint that this run would write.
        tasks: this run's; those that the folder's run has seen are built.
    """
    there, here = plain(found["hyperparameters"]), plain(wanted["hyperparameters"])
    different = [
        f"{name} {there.get(name)} there, {here.get(name)} here"
        for name in sorted((there.keys() - ONCE_OF_EVERY_RUN) | here.keys())
        if there.get(name) != here.get(name)
    ]
    if different:
        grown = len(different) == 1 and (here.get("n_tasks") or 0) > (there.get("n_tasks") or 0)
        way = (
            "leave --run_folder out: a run with more tasks goes on from it in a folder of its own"
            if grown
            else "give another folder, or start afresh with --no_resume"
        )
        raise InputError(f"{folder} holds a run with other hyperparameters ({'; '.join(different)}); {way}")
    if different := method_difference(found, wanted):
        raise InputError(f"{folder} holds a run by another method ({different}); {WAY_OUT}")
    if changed := changed_sets(found.get("sources", wanted["sources"]), wanted["sources"]):
        raise InputError(
            f"{folder} holds a run on other images of {', '.join(changed)} than are there now; give those back, "
            f"{WAY_OUT}"
        )
    if different := _network_difference(found, wanted["network"]):
        raise InputError(f"{folder} holds a run of another network ({different}); {WAY_OUT}")
    if different := tasks.difference(found.get("tasks", ())):
        raise InputError(f"{folder} holds a run on other tasks ({different}); give those back, {WAY_OUT}")


def _network_difference(found: State, network: State) -> str:
    if found.get("network"):
        return fingerprint.network_difference(found["network"], network)
    known = found.get("network_digest")
    return (
        "" if known in (None, fingerprint.network_digest(network)) else "in what, its damaged config.json does not tell"
    )


def method_difference(found: State, wanted: State) -> str:
    """The classes of two runs' methods where they differ, wherever they stand; empty if they do not."""
    there, here = found.get("method_class", ""), wanted["method_class"]
    same = not there or there.rpartition(".")[2] == here.rpartition(".")[2]
    return "" if same else f"class {there} there, {here} here"


def changed_sets(found: State, wanted: State) -> list[str]:
    """Names of the data sets whose checksums differ (Benchmark.sources)."""
    parts = ("train_sha256", "test_sha256")
    return [
        name
        for name, source in wanted.items()
        if any(source.get(part) != found.get(name, {}).get(part) for part in parts)
    ]


def of_summary(folder: Path, summary: State, hyperparameters: Collection[str]) -> State:
    """What a finished run tells of what it was made of when its checkpoint is gone.

    Args:
        folder: of the run.
        summary: its content.
        hyperparameters: the names of those that count.
    """
    state: dict[str, Any] = {
        "hyperparameters": {name: summary["hyperparameters"].get(name) for name in hyperparameters}
    }
    if "sources" in summary["data"]:
        state["sources"] = summary["data"]["sources"]
    if "network" in summary:
        state |= {"tasks": summary["tasks"], "network_digest": summary["network"]["fingerprint"]}
        with suppress(OSError, ValueError, KeyError, TypeError):
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            state |= {"network": config["network"], "method_class": config.get("method", "")}
    return state


def other_code(made_by: Iterable[str | None], here: str | None) -> list[str]:
    """What to say where a run was made by other code than there is now.

    Args:
        made_by: commits, as `hardware.commit` gave them; those of a summary in one text.
        here: that of the code as it is.
    """
    known = [commit for text in made_by for commit in (text or "").split(", ") if commit]
    if here is None or not known or here in known:
        return []
    return [f"note: it was made by the code of {', '.join(known)}, which is at {here} now: what it computes may differ"]


def plain(value: Any) -> Any:
    """A value as it comes back from a JSON file."""
    return json.loads(json.dumps(value))
