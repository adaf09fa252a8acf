"""The summary of a run: what summary.json holds, written and checked here."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine import metrics
from engine.files import write_json, write_text
from gradproj.errors import one_line
from gradproj.interference import EDGES

SUMMARY = "summary.json"
MATRIX = "accuracy.csv"


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Write summary.json, and its accuracy matrix as accuracy.csv."""
    write_matrix(folder, summary)
    write_json(folder / SUMMARY, summary)


def write_matrix(folder: Path, summary: dict[str, Any]) -> None:
    """Write a summary's accuracy matrix as accuracy.csv."""
    write_text(folder / MATRIX, as_csv(summary["accuracy"], [task["name"] for task in summary["tasks"]]))


def as_csv(accuracy: metrics.AccuracyMatrix, tasks: Sequence[str]) -> str:
    """An accuracy matrix: a row after each task, a column for each, both under their names."""
    text = io.StringIO()
    rows = [["" if value is None else f"{value:.4f}" for value in row] for row in accuracy]
    body = [[f"after {name}", *row] for name, row in zip(tasks, rows, strict=True)]
    csv.writer(text, lineterminator="\n").writerows([["test accuracy, %", *tasks], *body])
    return text.getvalue()


def scores(accuracy: metrics.AccuracyMatrix) -> dict[str, float | None]:
    """The numbers of a summary that follow from its accuracy matrix."""
    return {
        "average_accuracy": metrics.average_accuracy(accuracy),
        "backward_transfer": metrics.backward_transfer(accuracy),
        "forgetting": metrics.forgetting(accuracy),
    }


def scores_in_words(summary: dict[str, Any]) -> str:
    """ACC and BWT of a summary."""
    transfer = summary["backward_transfer"]
    return f"ACC {summary['average_accuracy']:.2f} %" + ("" if transfer is None else f", BWT {transfer:+.2f}")


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run in a folder; None where there is none or it is damaged."""
    summary, wrong = load_summary(folder / SUMMARY)
    return None if wrong or not summary["finished"] else summary | {"folder": str(folder)}


def load_summary(file: Path) -> tuple[dict[str, Any], str]:
    """A summary and what keeps it from being used; that is empty if nothing does.

    Args:
        file: a summary.json, or a copy of one under another name.
    """
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        wrong = "not a JSON object" if not isinstance(summary, dict) else fault(summary)
    except (OSError, ValueError, RecursionError) as error:
        return {}, one_line(error)
    return (summary, wrong) if wrong else (upgraded(summary), "")


# What older versions did not write into summaries: title and place of each method.
TITLES = {
    "gpm": "GPM",
    "naive": "naive",
    "multitask": "Multitask",
    "single": "Single",
    "ewc": "EWC",
    "a_gem": "A-GEM",
    "er": "ER-Res",
    "owm": "OWM",
    "hat": "HAT",
    "ogd": "OGD",
}
# Hyperparameters whose default older versions took from the script, by method and benchmark (None: any).
DEFAULTS_SINCE = {
    ("hat", None): ("lr", 0.05),
    ("ogd", None): ("lr", 0.001),
    ("ewc", "cifar100"): ("ewc_lambda", 100.0),
}


def upgraded(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary of an older version as this one would have written it."""
    if "title" in summary:
        return summary
    method = summary["method"]
    parts = [] if summary["variant"] == "default" else summary["variant"].split(",")
    for benchmark in (None, summary["benchmark"]):
        name, default = DEFAULTS_SINCE.get((method, benchmark), (None, None))
        used = summary.get("hyperparameters", {}).get(name)
        if used is not None:
            parts = [part for part in parts if not part.startswith(f"{name}=")]
            parts += [] if used == default else [f"{name}={used}"]
    return summary | {
        "variant": ",".join(parts) or "default",
        "title": TITLES.get(method, method),
        "place": list(TITLES).index(method) if method in TITLES else None,
        "task_identity": method in ("single", "hat"),
    }


LARGEST = 1e100  # of a summary's numbers: their squares stay finite
# Plain values that a summary may leave out, or have as null.
OPTIONAL = {"commit": str, "place": int, "versions": dict}


def fault(summary: dict[str, Any]) -> str:
    """What keeps a summary from being used; empty if nothing does."""
    data, seconds, tasks = summary.get("data"), summary.get("seconds"), summary.get("tasks") or []
    notes = data.get("notes", []) if isinstance(data, dict) else None
    sources = (data.get("sources") or {}) if isinstance(data, dict) else None
    columns, sizes, interference, network = (
        summary.get(key) or {} for key in ("memory_columns", "memory_input_sizes", "interference", "network")
    )
    accuracy = summary.get("accuracy")
    checks = {
        **{key: isinstance(summary.get(key), str) for key in ("benchmark", "method", "variant", "device")},
        "seed": isinstance(summary.get("seed"), int),
        "finished": isinstance(summary.get("finished"), bool),
        "data": isinstance(notes, list) and isinstance(data.get("kind"), str) and all(type(n) is str for n in notes),
        "data.sources": isinstance(sources, dict) and all(isinstance(source, dict) for source in sources.values()),
        "hyperparameters": isinstance(summary.get("hyperparameters", {}), dict),
        "average_accuracy": _is_number(summary.get("average_accuracy")),
        "backward_transfer": summary.get("backward_transfer", "") is None
        or _is_number(summary.get("backward_transfer")),
        "accuracy": _is_matrix(accuracy),
        **{
            key: not summary.get(key) or _are_of_one_size(summary[key], accuracy)
            for key in ("valid_accuracy", "class_incremental")
        },
        **{key: isinstance(summary.get(key), (kind, type(None))) for key, kind in OPTIONAL.items()},
        "memory_floats": summary.get("memory_floats") is None or _are_counts([summary["memory_floats"]]),
        "memory_columns": isinstance(columns, dict) and all(map(_are_counts, columns.values())),
        "memory_input_sizes": isinstance(sizes, dict)
        and _are_counts(list(sizes.values()))
        and all(sizes.values())
        and (not sizes or all(name in sizes for name in (columns if isinstance(columns, dict) else ()))),
        "interference": isinstance(interference, dict) and all(map(_is_interference, interference.values())),
        "network": isinstance(network, dict) and isinstance(network.get("fingerprint", ""), str),
        "epochs": _are_counts(summary.get("epochs") or []),
        "tasks": isinstance(tasks, list)
        and all(isinstance(t, dict) and type(t.get("name")) is str for t in tasks)
        and (not tasks or not _is_matrix(accuracy) or len(tasks) == metrics.n_tasks(accuracy)),
        "seconds": isinstance(seconds, dict) and "total" in seconds and all(map(_is_number, seconds.values())),
        "title": isinstance(summary.get("title", ""), str),
        "task_identity": "title" not in summary or isinstance(summary.get("task_identity"), bool),
    }
    wrong = [key for key, fine in checks.items() if not fine]
    return f"{', '.join(wrong)} missing or of a wrong kind" if wrong else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < LARGEST for n in value)


def _is_matrix(value: Any) -> bool:
    rows = value if isinstance(value, list) else []
    fine = all(isinstance(row, list) and row and all(x is None or _is_number(x) for x in row) for row in rows)
    return bool(rows) and fine and {len(row) for row in rows} == {len(rows[0])} and len(rows) in (1, len(rows[0]))


def _are_of_one_size(value: Any, other: Any) -> bool:
    return _is_matrix(value) and _is_matrix(other) and metrics.n_tasks(value) == metrics.n_tasks(other)


def _is_interference(value: Any) -> bool:
    known = isinstance(value, dict) and _are_counts(value.get("counts")) and _is_number(value.get("ratio"))
    return known and len(value["counts"]) == len(EDGES) - 1
