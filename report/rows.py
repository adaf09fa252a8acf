"""Runs summed up over their seeds, each row beside what the paper reports."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.metrics import average_accuracy, forward_transfer, learned, learned_jointly
from report.published import BENCHMARKS, ORDER, PUBLISHED, Estimate, Published, reproduced
from report.runs import Run


@dataclass
class Row:
    """The runs that differ in their seed alone."""

    benchmark: str
    data: str
    variant: str
    method: str
    runs: list[Run]
    accuracy: Estimate
    backward_transfer: Estimate | None
    valid_accuracy: Estimate | None  # over all tasks after the last one: what hyperparameters are chosen by
    seconds: float
    hardware: str
    forward_transfer: Estimate | None = None  # where runs of single networks are at hand
    published: Published | None = None
    verdict: str = "–"  # "yes", "no …", or why the row cannot be compared
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The method's name as papers print it."""
        return self.runs[0].summary["title"]

    @property
    def place(self) -> int | None:
        """The method's, in the order of colours."""
        return self.runs[0].summary["place"]

    @property
    def task_identity(self) -> bool:
        """Whether at test the method uses which task an image is of, beyond the choice of a head."""
        return self.runs[0].summary["task_identity"]

    @property
    def commits(self) -> list[str]:
        """Of the code that made the runs."""
        return list(dict.fromkeys(run.summary.get("commit") or "unknown" for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted(run.summary["seed"] for run in self.runs)


def summarise(runs: Sequence[Run]) -> list[Row]:
    """One row for each benchmark, data, variant and method, in the order of a paper's table."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        summary = run.summary
        key = (summary["benchmark"], summary["data"]["kind"], summary["variant"], summary["method"])
        groups.setdefault((*key, tuple(summary["data"].get("notes", ()))), []).append(run)

    def order(key: tuple) -> tuple:
        benchmark, data, variant, method, notes = key
        place = [list(names).index(name) if name in names else 99 for names, name in _named(benchmark, method)]
        return place[0], benchmark, data != "real", variant != "default", variant, place[1], method, notes

    rows = [_row(key, groups[key]) for key in sorted(groups, key=order)]
    alone = {(row.benchmark, row.data, row.variant): row for row in rows if row.method == "single"}
    for row in rows:
        if (single := alone.get((row.benchmark, row.data, row.variant))) is not None:
            row.forward_transfer = _forward_transfer(row, single)
    return rows


def _forward_transfer(row: Row, single: Row) -> Estimate | None:
    """FWT of each run against the network of the same seed; against the mean of all where it is not there."""
    matrices = {run.summary["seed"]: run.summary["accuracy"] for run in single.runs}
    everything = [list(diagonal) for diagonal in zip(*map(learned, matrices.values()), strict=True)]
    mean = [statistics.fmean(accuracies) for accuracies in everything]
    values = []
    for run in row.runs:
        accuracy = run.summary["accuracy"]
        alone = learned(matrices[run.summary["seed"]]) if run.summary["seed"] in matrices else mean
        if learned_jointly(accuracy) or len(alone) != len(accuracy) or len(accuracy) < 2:
            return None
        values.append(forward_transfer(accuracy, alone))
    return estimate(values)


def _named(benchmark: str, method: str) -> tuple:
    return (BENCHMARKS, benchmark), (ORDER, method)


def _row(key: tuple, found: list[Run]) -> Row:
    benchmark, data, variant, method, notes = key
    by_seed: dict[int, Run] = {}
    remarks = list(notes)
    for run in found:
        first = by_seed.setdefault(run.summary["seed"], run)
        if first is not run and first.summary["accuracy"] != run.summary["accuracy"]:
            remarks.append(f"seed {run.summary['seed']} is there twice with different numbers; left out: {run.path}")
    runs = list(by_seed.values())
    transfers = [run.summary["backward_transfer"] for run in runs]
    validation = [_validation(run) for run in runs]
    row = Row(
        benchmark=benchmark,
        data=data,
        variant=variant,
        method=method,
        runs=runs,
        accuracy=estimate([run.summary["average_accuracy"] for run in runs]),
        backward_transfer=None if None in transfers else estimate(transfers),
        valid_accuracy=None if None in validation else estimate(validation),
        seconds=statistics.fmean(run.summary["seconds"]["total"] for run in runs),
        hardware="; ".join(dict.fromkeys(tidy_hardware(run.summary["device"]) for run in runs)),
        published=PUBLISHED.get((benchmark, method)) if data == "real" else None,
        notes=remarks,
    )
    other = _named_by(row, False)
    # A protocol's notes say what the variant says already; any other tells of images that are not the published ones.
    complete = not other and all(note.startswith("protocol ") for note in notes)
    row.verdict = verdict(row, complete, same_images=_same_images(runs))
    row.notes += [f"{name}: these are not the published images, their checksums say" for name in other]
    row.notes += [f"{name}: nothing here tells whether these are the published images" for name in _named_by(row, None)]
    if not _same_images(runs):
        row.notes.append("the runs of this row used different images (their checksums differ)")
    return row


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and sample standard deviation (over n - 1)."""
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _validation(run: Run) -> float | None:
    """The mean validation accuracy over all tasks after the last one; None where some tasks have no such images."""
    accuracy = run.summary.get("valid_accuracy") or [[None]]
    return None if None in accuracy[-1] else average_accuracy(accuracy)


def _same_images(runs: Sequence[Run]) -> bool:
    def checksums(run: Run) -> str:
        sources = run.summary["data"].get("sources") or {}
        return json.dumps(
            {name: [source.get("train_sha256"), source.get("test_sha256")] for name, source in sources.items()},
            sort_keys=True,
        )

    return len({checksums(run) for run in runs}) == 1


def _named_by(row: Row, verified: bool | None) -> list[str]:
    """Real data sets with an answer to whether they are the published ones, but for those that a note mentions."""
    if row.data != "real":
        return []
    sources = [run.summary["data"].get("sources") or {} for run in row.runs]
    names = {name: None for found in sources for name, source in found.items() if source.get("verified") is verified}
    return [name for name in names if not any(note.startswith(f"{name}:") for note in row.notes)]


def verdict(row: Row, complete: bool, same_images: bool) -> str:
    """Whether the paper's row is reproduced, or why that cannot be said.

    Args:
        row: with its means and the published row.
        complete: the benchmark ran on the complete published data sets.
        same_images: all seeds did so on the same images.
    """
    if row.data != "real":
        return f"{row.data} data"
    if row.published is None:
        return "nothing published"
    if row.published.caveat:
        return f"not comparable: {row.published.caveat}"
    if row.variant not in row.published.variants:
        return "not comparable: variant"
    if not complete:
        return "not comparable: data, see note"
    if not same_images:
        return "not comparable: images differ"
    pairs = {
        "ACC": (row.accuracy, row.published.accuracy),
        "BWT": (row.backward_transfer, row.published.backward_transfer),
    }
    missed = [
        f"{name} {'above' if ours.mean > paper.mean else 'below'}"
        for name, (ours, paper) in pairs.items()
        if ours and paper and not reproduced(ours, paper)
    ]
    return f"no ({' and '.join(missed)})" if missed else "yes"


def tidy_hardware(device: str) -> str:
    """A device's description without trademark signs."""
    device = device.replace("(R)", "").replace("(TM)", "").replace(", 1 thread(s)", ", 1 thread")
    return " ".join(device.replace("thread(s)", "threads").split())
