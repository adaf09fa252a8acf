"""Runs summed up over their seeds and task orders, each row beside what the paper reports."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, fields

from engine.metrics import average_accuracy, forward_transfer, learned, learned_jointly, n_tasks
from engine.options import Options, short, told
from engine.same import ONCE_OF_EVERY_RUN
from report.published import BENCHMARKS, ORDER, PUBLISHED, Estimate, Published, place_in, reproduced
from report.runs import Run

ORDER_OF_TASKS = "t_order"  # the hyperparameter over which, as over seeds, published figures are means
# Hyperparameters in which runs of one row may differ, or which name the row otherwise.
NO_PART_OF_A_ROW = {ORDER_OF_TASKS, "seed", "method", "data", "images", "tasks", "name"} | {
    field.name for field in fields(Options) if not told(field)["affects_results"]
}


@dataclass
class Row:
    """The runs that differ in their seed and the order of their tasks alone."""

    benchmark: str
    data: str
    variant: str
    method: str
    runs: list[Run]
    accuracy: Estimate
    backward_transfer: Estimate | None
    valid_accuracy: Estimate | None  # over all tasks after the last one: what hyperparameters are chosen by
    seconds: float  # of a run: the median, which one run on a busy machine does not move
    hardware: str
    forward_transfer: Estimate | None = None  # where runs of single networks are at hand
    class_incremental: Estimate | None = None  # over all tasks after the last one, where all runs measured it
    published: Published | None = None
    verdict: str = "–"  # "yes", "no …", or why the row cannot be compared
    notes: list[str] = field(default_factory=list)
    origin: str = ""  # a note on which code made which of the runs, where it was not all the same

    @property
    def title(self) -> str:
        """The method's name as papers print it."""
        return self.runs[0].summary["title"]

    @property
    def place(self) -> int | None:
        """The method's, in the order of colours."""
        return self.runs[0].summary.get("place")

    @property
    def task_identity(self) -> bool:
        """Whether at test the method uses which task an image is of, beyond the choice of a head."""
        return self.runs[0].summary["task_identity"]

    @property
    def compared(self) -> bool:
        """Whether the verdict says that the paper's numbers are reproduced, or are not."""
        return self.verdict == "yes" or self.verdict.startswith("no (")

    @property
    def commits(self) -> dict[str, list[Run]]:
        """Of the code that made the runs, and which it made."""
        made: dict[str, list[Run]] = {}
        for run in self.runs:
            made.setdefault(run.summary.get("commit") or "unknown", []).append(run)
        return made

    @property
    def seeds(self) -> list[int]:
        """Of the runs, ascending, each once."""
        return sorted({run.summary["seed"] for run in self.runs})

    @property
    def orders(self) -> list[int]:
        """Of the runs' tasks, ascending, each once; empty where the benchmark has one order."""
        return sorted({order for run in self.runs if (order := order_of(run)) is not None})


def order_of(run: Run) -> int | None:
    """Which of several published orders a run's tasks have."""
    order = run.summary.get("hyperparameters", {}).get(ORDER_OF_TASKS)
    return order if isinstance(order, int) else None


def n_tasks_of(run: Run) -> int:
    """How many tasks a run learned."""
    return n_tasks(run.summary["accuracy"])


def runs_in_words(runs: Sequence[Run]) -> str:
    """Which seeds and orders some runs of a row are: `seeds 1–3`, or `orders 0–4, seed 1`."""
    seeds = _listed("seed", {run.summary["seed"] for run in runs})
    orders = {order_of(run) for run in runs}
    return seeds if orders <= {None, 0} else f"{_listed('order', orders)}, {seeds}"


def _listed(noun: str, numbers: Iterable[int]) -> str:
    numbers = sorted(numbers)
    if len(numbers) == 1:
        return f"{noun} {numbers[0]}"
    consecutive = len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1
    return f"{noun}s " + (f"{numbers[0]}–{numbers[-1]}" if consecutive else ", ".join(map(str, numbers)))


def without(variant: str, names: Collection[str]) -> str:
    """A variant but for some hyperparameters; `default` where none are left."""
    parts = variant.split(",")
    return ",".join(part for part in parts if part.partition("=")[0] not in names) or "default"


def summarise(runs: Sequence[Run], join_orders: bool = True) -> list[Row]:
    """One row for each benchmark, data, variant and method, in the order of a paper's table.

    Args:
        runs: finished ones.
        join_orders: whether runs that differ in the order of their tasks are one row, as those that differ in the seed.
    """
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        summary = run.summary
        variant = without(summary["variant"], [ORDER_OF_TASKS]) if join_orders else summary["variant"]
        key = (summary["benchmark"], summary["data"]["kind"], variant, summary["method"])
        groups.setdefault((*key, tuple(summary["data"].get("notes", ()))), []).append(run)
    parted: dict[tuple, list[Run]] = {}
    for group in groups.items():
        for key, some in _alike(*group).items():  # which may be the key of other runs, where the value was a flag
            parted.setdefault(key, []).extend(some)

    def order(key: tuple) -> tuple:
        benchmark, data, variant, method, notes = key
        first = place_in(BENCHMARKS, benchmark), benchmark, data != "real", variant != "default", variant
        return *first, place_in(ORDER, method), method, notes

    rows = [_row(key, parted[key]) for key in sorted(parted, key=order)]
    alone = {(row.benchmark, row.data, row.variant): row for row in rows if row.method == "single"}
    for row in rows:
        if row.method != "single" and (single := alone.get((row.benchmark, row.data, row.variant))) is not None:
            row.forward_transfer = _forward_transfer(row, single)
    return rows


def _alike(key: tuple, runs: list[Run]) -> dict[tuple, list[Run]]:
    """Runs of one variant parted where their hyperparameters differ all the same, since a script's defaults were
    changed between them; the variants then name what differs."""
    options = [run.summary.get("hyperparameters", {}) | {"n_tasks": n_tasks_of(run)} for run in runs]
    names = sorted(set.intersection(*map(set, options)) - NO_PART_OF_A_ROW)
    of_methods = {method.partition("_")[0] for method in ORDER} - {key[3].partition("_")[0]}
    others = {name for name in ONCE_OF_EVERY_RUN if name.partition("_")[0] in of_methods}  # flags in older files
    names = [name for name in names if name not in others]
    differing = [name for name in names if len({json.dumps(values[name]) for values in options}) > 1]
    parted: dict[tuple, list[Run]] = {}
    for run, values in zip(runs, options, strict=True):
        variant = without(key[2], differing)
        parts = [*([] if variant == "default" else [variant]), *(f"{name}={short(values[name])}" for name in differing)]
        parted.setdefault((*key[:2], ",".join(parts) or key[2], *key[3:]), []).append(run)
    return parted


def _forward_transfer(row: Row, single: Row) -> Estimate | None:
    """FWT of each run against the network of the same seed, else the mean of all; of the same order of tasks always."""
    values = []
    for run in row.runs:
        accuracy = run.summary["accuracy"]
        same_order = [other for other in single.runs if order_of(other) == order_of(run)]
        same_seed = [other for other in same_order if other.summary["seed"] == run.summary["seed"]]
        diagonals = [learned(other.summary["accuracy"]) for other in same_seed or same_order]
        alone = [statistics.fmean(accuracies) for accuracies in zip(*diagonals, strict=True)]
        if learned_jointly(accuracy) or len(alone) != len(accuracy) or len(accuracy) < 2:
            return None
        values.append(forward_transfer(accuracy, alone))
    return estimate(values)


def _row(key: tuple, found: list[Run]) -> Row:
    benchmark, data, variant, method, notes = key
    different: dict[tuple, Run] = {}
    remarks = list(notes)
    for run in found:
        first = different.setdefault((order_of(run), run.summary["seed"]), run)
        if first is not run and first.summary["accuracy"] != run.summary["accuracy"]:
            remarks.append(f"{runs_in_words([run])} is there twice with different numbers; left out: {run.path}")
    runs = list(different.values())
    transfers = [run.summary["backward_transfer"] for run in runs]
    validation = [_final_mean(run, "valid_accuracy") for run in runs]
    class_incremental = [_final_mean(run, "class_incremental") for run in runs]
    row = Row(
        benchmark=benchmark,
        data=data,
        variant=variant,
        method=method,
        runs=runs,
        accuracy=estimate([run.summary["average_accuracy"] for run in runs]),
        backward_transfer=None if None in transfers else estimate(transfers),
        valid_accuracy=None if None in validation else estimate(validation),
        class_incremental=None if None in class_incremental else estimate(class_incremental),
        seconds=statistics.median(run.summary["seconds"]["total"] for run in runs),
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
    for what, of in (("tasks", _tasks), ("networks", _network)):
        if len({of(run) for run in runs} - {""}) > 1:
            row.notes.append(f"the runs of this row are of different {what}: their mean says little")
    if len(row.commits) > 1:
        made = [f"{commit} ({runs_in_words(members)})" for commit, members in row.commits.items()]
        row.origin = f"made by {len(made)} states of the code: {', '.join(made)}"
    return row


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and sample standard deviation (over n - 1)."""
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _final_mean(run: Run, name: str) -> float | None:
    """The mean over all tasks after the last one of a matrix in a summary; None where a task has no value."""
    matrix = run.summary.get(name) or [[None]]
    return None if None in matrix[-1] else average_accuracy(matrix)


def _same_images(runs: Sequence[Run]) -> bool:
    def checksums(run: Run) -> str:
        sources = run.summary["data"].get("sources") or {}
        return json.dumps(
            {name: [source.get("train_sha256"), source.get("test_sha256")] for name, source in sources.items()},
            sort_keys=True,
        )

    return len({checksums(run) for run in runs}) == 1


def _tasks(run: Run) -> str:
    """The tasks that a run learned, whatever their order: names and classes; empty where its summary has none, or
    where the benchmark's own hyperparameters decide them."""
    tasks = run.summary.get("tasks") or []
    if run.summary["benchmark"] in BENCHMARKS or not all("classes" in task for task in tasks):
        return ""
    return json.dumps(sorted(json.dumps([task["name"], task["classes"]]) for task in tasks)) if tasks else ""


def _network(run: Run) -> str:
    """The fingerprint of a run's network; empty where its summary has none."""
    return (run.summary.get("network") or {}).get("fingerprint", "")


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
        other = f"published under {row.published.variants[0]}"
        return f"not comparable: {other if row.variant == 'default' else 'variant'}"
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
