"""The pictures that a set of runs gives: the paper's figures, for every benchmark, data and variant among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from engine.options import short
from report.plots.accuracy import accuracy_heat_map, accuracy_over_time, mean_matrix
from report.plots.bars import bars, scores_against
from report.plots.interference import interference_histograms
from report.plots.memory import mean_columns, memory_growth
from report.plots.style import Looks, look, shades
from report.plots.style import save as save_figure
from report.published import BENCHMARKS, Estimate
from report.rows import Row, estimate, runs_in_words, summarise, without
from report.tables import IDENTITY

Save = Callable[[Figure, str], None]


def draw(rows: Sequence[Row], folder: Path, against: str | None = None) -> list[Path]:
    """Draw everything into a folder, as PNG and PDF; returns the files. The rest as `draw_pictures`."""
    written: list[Path] = []

    def save(figure: Figure, name: str) -> None:
        name = "".join(c if c.isalnum() or c in "._+-" else "-" for c in name)
        for suffix in ("png", "pdf"):
            written.append(folder / f"{name}.{suffix}")
            save_figure(figure, written[-1])

    draw_pictures(rows, save, against)
    return written


def draw_pictures(rows: Sequence[Row], save: Save, against: str | None = None) -> None:
    """Draw everything.

    Args:
        rows: the runs, summed up.
        save: takes each figure and its name.
        against: a hyperparameter; where rows differ in it alone, ACC, BWT and interference are drawn over it.
    """
    for members in comparisons(rows):
        draw_comparison(members, save)
    if against:
        for members in sweeps(rows, against):
            draw_sweep(members, against, save)


def sweeps(rows: Sequence[Row], against: str) -> list[list[Row]]:
    """Rows that differ in a hyperparameter alone, two or more of each kind."""
    apart = summarise([run for row in rows for run in row.runs], join_orders=False)  # perhaps t_order is swept
    groups = _grouped(apart, lambda row: (row.benchmark, row.data, row.method, without(row.variant, [against])))
    return [members for members in groups if len({str(_value(row, against)) for row in members}) > 1]


def comparisons(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows to draw beside each other, those that name a picture first: of one variant, and others whose variant is the
    same but for hyperparameters that their methods do not read. Rows that stand beside all so have no picture alone."""
    groups = _grouped(rows, lambda row: (row.benchmark, row.data, row.variant))
    beside = [[row for row in rows if row not in members and _is_beside(row, members[0])] for members in groups]
    joined = [row for some in beside for row in some]
    return [
        [*members, *others]
        for members, others in zip(groups, beside, strict=True)
        if others or any(row not in joined for row in members)
    ]


def _is_beside(row: Row, other: Row) -> bool:
    """Whether a row's variant is another's but for what its method does not read."""
    read = row.runs[0].summary.get("hyperparameters") or {}
    unread = [name for part in other.variant.split(",") if (name := part.partition("=")[0]) not in read]
    same_images = (row.benchmark, row.data) == (other.benchmark, other.data)
    return same_images and bool(read and unread) and row.variant == without(other.variant, unread)


def draw_comparison(rows: Sequence[Row], save: Save) -> None:
    """Methods beside each other on one benchmark, data and variant; matrix and memory of each."""
    # Rows that differ in their notes alone would hide each other: the one with the most runs stands for all.
    best = {row.method: row for row in sorted(rows, key=lambda row: len(row.runs))}
    titles = [row.title for row in best.values()]
    shown = {
        row.title + f" ({row.method})" * (titles.count(row.title) > 1) + IDENTITY * row.task_identity: row
        for row in rows
        if best[row.method] is row
    }
    looks = {name: look(row.place, i) for i, (name, row) in enumerate(shown.items())}
    kind = rows[0].variant
    title = _title(rows[0], kind)
    with_seeds = f"{title}\n{_seeds(shown)}"
    stem = f"{rows[0].data}-{rows[0].benchmark}-{kind}"
    matrices = {name: [run.summary["accuracy"] for run in row.runs] for name, row in shown.items()}
    save(accuracy_over_time(matrices, with_seeds, looks), f"{stem}-accuracy_over_time")
    draw_class_incremental(shown, looks, title, stem, save)
    scores = {name: (row.accuracy, row.backward_transfer) for name, row in shown.items()}
    save(bars(scores, ("ACC, %", "BWT, points"), with_seeds, (False, True), looks), f"{stem}-methods")
    draw_costs({name: row for name, row in shown.items() if row.method != "multitask"}, looks, title, stem, save)
    draw_interference(shown, {name: found.color for name, found in looks.items()}, title, stem, save)
    for name, row in shown.items():
        words = ("mean over " if len(row.runs) > 1 else "") + runs_in_words(row.runs)
        heading = title.replace(" data)", f" data), {name}, {words}", 1)
        save(accuracy_heat_map(mean_matrix(matrices[name]), heading), f"{stem}-{row.method}-accuracy")
        columns = mean_columns([run.summary.get("memory_columns") or {} for run in row.runs])
        sizes = row.runs[0].summary.get("memory_input_sizes")
        if columns and sizes:
            save(memory_growth(columns, sizes, heading), f"{stem}-{row.method}-memory")


def draw_costs(shown: dict[str, Row], looks: Looks, title: str, stem: str, save: Save) -> None:
    """Memory relative to the largest possible GPM, and time of an epoch (the paper's Figure 2).

    Args:
        shown: all but joint training, which keeps all images and whose epoch is one of all tasks: it would dwarf the
            others.
    """
    sizes = [row.runs[0].summary.get("memory_input_sizes") for row in shown.values()]
    largest = max((sum(d * d for d in size.values()) for size in sizes if size), default=0)
    epochs = {name: [run.summary.get("epochs") for run in row.runs] for name, row in shown.items()}
    if len(shown) < 2 or not largest or not all(counts and sum(counts) for runs in epochs.values() for counts in runs):
        return  # the largest size is known where GPM is among the methods

    def mean(known: Sequence[float | None], units: Sequence[float]) -> Estimate | None:
        return None if None in known else estimate([value / unit for value, unit in zip(known, units, strict=True)])

    costs = {
        name: (
            mean([run.summary.get("memory_floats") for run in row.runs], [largest / 100] * len(row.runs)),
            mean([run.summary["seconds"].get("train") for run in row.runs], list(map(sum, epochs[name]))),
        )
        for name, row in shown.items()
    }
    headings = ("memory, % of the largest GPM", "seconds an epoch")
    save(bars(costs, headings, f"{title}\n{_seeds(shown)}", looks=looks), f"{stem}-costs")


def draw_class_incremental(shown: dict[str, Row], looks: Looks, title: str, stem: str, save: Save) -> None:
    """Accuracy over time without the task's identity, of the methods whose runs have it."""
    shown = {name: row for name, row in shown.items() if row.class_incremental}
    if shown:
        matrices = {name: [run.summary["class_incremental"] for run in row.runs] for name, row in shown.items()}
        heading = f"{title}, class-incremental: the network is not told which task an image is of\n{_seeds(shown)}"
        save(accuracy_over_time(matrices, heading, looks), f"{stem}-class_incremental")


def draw_interference(shown: dict[str, Row], colors: dict[str, Any], title: str, stem: str, save: Save) -> None:
    """Histograms of the interference activations, where two or more rows have recorded them (Figure 3), in the layers
    that all their runs have."""
    found = {name: [run.summary.get("interference") for run in row.runs] for name, row in shown.items()}
    found = {name: runs for name, runs in found.items() if all(runs)}
    everything = [run for runs in found.values() for run in runs]
    layers = [layer for layer in everything[0] if all(layer in run for run in everything)] if everything else []
    found = {name: [{layer: run[layer] for layer in layers} for run in runs] for name, runs in found.items()}
    if len(found) > 1 and layers:
        save(interference_histograms(found, colors, title), f"{stem}-interference")


def draw_sweep(rows: Sequence[Row], name: str, save: Save) -> None:
    """ACC, BWT and interference over the values of a hyperparameter."""
    rows = sorted(rows, key=lambda row: _place(_value(row, name)))
    values = [_value(row, name) for row in rows]
    labels = [" ".join(map(str, value)) if isinstance(value, list) else short(value) for value in values]
    others = without(rows[0].variant, [name])
    title = _title(rows[0], others, rows[0].title)
    stem = f"{rows[0].data}-{rows[0].benchmark}-{others}-{rows[0].method}-{name}"
    save(scores_against(labels, rows, name, title), f"{stem}-sweep")
    shown = {f"{name} {label}": row for label, row in zip(labels, rows, strict=True)}
    draw_interference(shown, shades(list(shown)), title, stem, save)


def _seeds(shown: dict[str, Row]) -> str:
    """Which runs stand behind a picture of some rows."""
    words = {runs_in_words(row.runs) for row in shown.values()}
    counts = [f"{name} {len(row.runs)}" for name, row in shown.items()]
    runs = words.pop() if len(words) == 1 else f"runs ({', '.join(counts)})"
    several = any(len(row.runs) > 1 for row in shown.values())
    told = any(row.task_identity for row in shown.values())
    mark = f"\n{IDENTITY.strip()} is told which task an image is of" if told else ""
    return (f"mean ± one standard deviation over {runs}" if several else runs) + mark


def _grouped(rows: Sequence[Row], key: Callable[[Row], tuple]) -> list[list[Row]]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return list(groups.values())


def _value(row: Row, name: str) -> Any:
    return row.runs[0].summary.get("hyperparameters", {}).get(name)


def _place(value: Any) -> tuple[bool, list[float], str]:
    """By what the values of a hyperparameter are sorted: numbers by size, anything else after them by name."""
    numbers = [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, (int, float))]
    return not numbers, numbers, short(value)


def _title(row: Row, variant: str, method: str | None = None) -> str:
    title = f"{BENCHMARKS.get(row.benchmark, row.benchmark)} ({row.data} data)"
    title += f", {method}" if method else ""
    return title if variant == "default" else f"{title}\n{variant}"
