"""Pictures of runs: accuracy matrix, accuracy over time, growth of the memory, methods beside each other.

Every function returns a Matplotlib figure and leaves Matplotlib's global state alone; `save` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from engine.metrics import AccuracyMatrix
from gradproj.files import write_atomically
from gradproj.interference import EDGES
from report.published import METHODS, Estimate

# The eight colours of Okabe and Ito, which colour-blind readers tell apart, and two more; a method keeps its colour
# and marker in every picture.
STYLES = {
    "gpm": ("#0072B2", "o"),
    "naive": ("#D55E00", "s"),
    "multitask": ("#000000", "*"),
    "single": ("#777777", "P"),
    "ewc": ("#E69F00", "^"),
    "a_gem": ("#56B4E9", "v"),
    "er": ("#009E73", "D"),
    "owm": ("#CC79A7", "X"),
    "hat": ("#8C6D1F", "<"),
    "ogd": ("#44337A", ">"),
}
MARKERS = "os^DvPX<>*"
MOST_PANELS = 6
TITLE, LABEL, TICK = 11, 10.5, 9.5  # font sizes, points


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, in the format that the file name ends with (png, pdf, svg)."""
    FigureCanvasAgg(figure)  # no window system, and no global state as with pyplot
    kind = path.suffix.lstrip(".") or "png"
    metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None} if kind == "png" else None
    with rc_context({"pdf.fonttype": 42}):  # letters stay letters: searchable, and accepted by publishers
        write_atomically(
            path,
            lambda file: figure.savefig(
                file, format=kind, dpi=160, bbox_inches="tight", pad_inches=0.08, metadata=metadata
            ),
        )


def accuracy_heat_map(accuracy: AccuracyMatrix, title: str) -> Figure:
    """Test accuracy on task j (columns) after learning task i (rows), percent, with the values in the cells."""
    values = _array(accuracy)
    n_tasks = len(values)
    cell = 0.52 if n_tasks <= 12 else 0.42  # inches
    side = max(2.2, cell * n_tasks)
    figure = Figure(figsize=(side + 1.9, side + 1.0), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
    form, size = ("{:.1f}", 9 if n_tasks <= 12 else 8) if n_tasks <= 12 else ("{:.0f}", 9)
    for i, j in np.argwhere(np.isfinite(values)):
        color = "black" if values[i, j] > 60 else "white"
        axes.text(j, i, form.format(values[i, j]), ha="center", va="center", color=color, fontsize=size)
    _number_tasks(axes, n_tasks, "x", every=1)
    _number_tasks(axes, n_tasks, "y", every=1)
    axes.set_xlim(-0.5, n_tasks - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, "tested on task", "after learning task")
    bar = figure.colorbar(picture, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("test accuracy, %", fontsize=LABEL)
    bar.ax.tick_params(labelsize=TICK)
    _title(figure, title, side + 1.9)
    return figure


def memory_growth(columns: Mapping[str, Sequence[float]], sizes: Mapping[str, int], title: str) -> Figure:
    """Basis columns over input size (k/d, percent) of each layer after each task."""
    n_tasks = max(map(len, columns.values()))
    width = 8.2 if len(columns) > 6 else 7.2
    figure = Figure(figsize=(width, 4.4 if len(columns) <= 12 else 5.0), layout="constrained")
    axes = figure.add_subplot()
    colors = shades(list(columns))
    for index, (key, counts) in enumerate(columns.items()):
        axes.plot(  # markers and dashes tell neighbours apart without the colour
            range(len(counts)),
            [100 * k / sizes[key] for k in counts],
            color=colors[key],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            linestyle=("-", "--", ":")[index // len(MARKERS) % 3],
            linewidth=1.6,
            label=f"{key}  ({sizes[key]})",
            clip_on=False,
        )
    _number_tasks(axes, n_tasks, "x")
    axes.set_xlim(-0.3, max(n_tasks - 0.7, 0.3))
    axes.set_ylim(0, 100)
    _plain(axes)
    _label(axes, "tasks learned", "memory, % of the layer's input dimensions")
    legend = figure.legend(
        loc="outside right center",
        fontsize=9 if len(columns) <= 12 else 8,
        frameon=False,
        title="layer (input size)",
        title_fontsize=9,
        handlelength=2.6,
        labelspacing=0.45,
    )
    legend.set_alignment("left")
    _title(figure, title, width)
    return figure


def accuracy_over_time(matrices: Mapping[str, Sequence[AccuracyMatrix]], title: str) -> Figure:
    """Accuracy on task 1, and on average over the tasks learned so far, as tasks are added.

    Args:
        matrices: of each method, the accuracy matrices of its seeds.
        title: what was run.
    Returns:
        two panels; lines are means over seeds, bands one standard deviation.
    """
    width = 9.6
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    n_tasks = max(len(matrix) for seeds in matrices.values() for matrix in seeds)
    for index, (method, seeds) in enumerate(matrices.items()):
        stack = np.stack([_array(matrix) for matrix in seeds])  # (seeds, tasks, tasks)
        measured = np.isfinite(stack)
        counts = measured.sum(2)
        averages = np.where(measured, stack, 0).sum(2) / np.maximum(counts, 1)
        averages = np.where(counts > 0, averages, np.nan)  # (seeds, tasks)
        for axes, curves in zip(panels, (stack[:, :, 0], averages), strict=True):
            _curve(axes, curves, method, index)
    for axes, name in zip(panels, ("Task 1", "Average of the tasks so far"), strict=True):
        axes.set_title(name, fontsize=LABEL)
        _number_tasks(axes, n_tasks, "x")
        axes.set_xlim(-0.3, max(n_tasks - 0.7, 0.3))
        _plain(axes)
        _label(axes, "tasks learned", "")
    panels[0].set_ylabel("test accuracy, %", fontsize=LABEL)
    panels[0].set_ylim(*_accuracy_limits(panels))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=TICK, frameon=False)
    _title(figure, title, width)
    return figure


def bars(
    scores: Mapping[str, tuple[Estimate | None, ...]],
    headings: Sequence[str],
    title: str,
    signed: Sequence[bool] = (False, False),
) -> Figure:
    """Numbers of each method, a panel for each kind, error bars one standard deviation over seeds.

    Args:
        scores: of each method, one number for each panel; None where it has no meaning.
        headings: of the panels: what is measured, and its unit.
        title: what was run.
        signed: for each panel, whether the numbers at the bars show a plus.
    """
    width = max(6.4, 2.4 + 0.95 * len(scores))
    figure = Figure(figsize=(width, 4.0), layout="constrained")
    panels = figure.subplots(1, len(headings))
    names = [METHODS.get(method, method) for method in scores]
    for part, (axes, heading) in enumerate(zip(panels, headings, strict=True)):
        estimates = [pair[part] for pair in scores.values()]
        means = [0.0 if e is None else e.mean for e in estimates]
        errors = [0.0 if e is None else e.std or 0.0 for e in estimates]
        lowest = min(0.0, *(m - e for m, e in zip(means, errors, strict=True)))
        highest = max(0.0, *(m + e for m, e in zip(means, errors, strict=True)))
        span = (highest - lowest) or 1.0
        room = 0.14 * span  # for the numbers at the bars' ends
        digits = min(4, max(1, 2 - int(np.floor(np.log10(span)))))  # of the largest, three
        for x, (method, estimate) in enumerate(zip(scores, estimates, strict=True)):
            if estimate is None:
                axes.text(x, 0.1 * room, "–", ha="center", va="bottom", fontsize=TICK)
                continue
            color = style(method, x)[0]
            axes.bar(x, estimate.mean, width=0.66, color=color, zorder=2)
            if estimate.std:
                for ink, thickness in (("white", 3.2), ("#333333", 1.3)):  # a halo, to be seen on dark bars too
                    bar = {"color": ink, "capsize": 4, "linewidth": thickness, "capthick": thickness, "zorder": 3}
                    axes.errorbar(x, estimate.mean, estimate.std, **bar)
            down = estimate.mean < 0
            tip = estimate.mean + (-1 if down else 1) * ((estimate.std or 0.0) + 0.12 * room)
            text = f"{estimate.mean:{'+' if signed[part] else ''}.{digits}f}"
            text = text.replace("-", "\N{MINUS SIGN}")  # as on the axis
            axes.text(x, tip, text, ha="center", va="top" if down else "bottom", fontsize=TICK)
        axes.axhline(0, color="black", linewidth=0.8, zorder=4)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylim(lowest - room * (lowest < 0), highest + room * (highest > 0 or lowest == 0))
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(names) > 4 else {}
        axes.set_xticks(range(len(names)), names, **turned)
        _plain(axes)
        axes.grid(axis="x", visible=False)
        _label(axes, "", heading)
    _title(figure, title, width)
    return figure


def scores_against(labels: Sequence[str], rows: Sequence[Any], name: str, title: str) -> Figure:
    """ACC and BWT over the values of a hyperparameter, error bars one standard deviation over seeds.

    Args:
        labels: the values, ascending, drawn at equal distances.
        rows: one for each value: `method`, `accuracy` and `backward_transfer`, Estimates (the latter perhaps None).
        name: of the hyperparameter.
        title: what was run.
    """
    width = max(6.4, 3.2 + 0.9 * len(labels))
    figure = Figure(figsize=(width, 3.8), layout="constrained")
    kinds = (("accuracy", "ACC, %"), ("backward_transfer", "BWT, points"))
    color, marker = style(rows[0].method, 0)
    for axes, (kind, heading) in zip(figure.subplots(1, 2), kinds, strict=True):
        points = [(x, e) for x, row in enumerate(rows) if (e := getattr(row, kind)) is not None]
        axes.errorbar(
            [x for x, _ in points],
            [e.mean for _, e in points],
            [e.std or 0.0 for _, e in points],
            color=color,
            marker=marker,
            markersize=5.5,
            linewidth=1.8,
            capsize=3,
        )
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.4, len(labels) - 0.6)
        _plain(axes)
        _label(axes, name, heading)
    _title(figure, title, width)
    return figure


def interference_histograms(
    found: Mapping[str, Sequence[Mapping[str, Any]]], colors: Mapping[str, Any], title: str
) -> Figure:
    """Densities of the interference activations ΔW x on the first task, a panel for each layer (paper Figure 3).

    Args:
        found: of each row, what `gradproj.interference.interference` gave for its runs, whose counts are added up.
        colors: of each row.
        title: what was run.
    """
    layers = list(next(iter(found.values()))[0])
    if len(layers) > MOST_PANELS:  # a deep network: some along its depth
        layers = [layers[round(i * (len(layers) - 1) / (MOST_PANELS - 1))] for i in range(MOST_PANELS)]
    across = min(3, len(layers))
    width, down = 3.1 * across + 1.4, -(-len(layers) // across)
    figure = Figure(figsize=(width, 2.5 * down + 0.7), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=True)
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    for axes, layer in zip(grid.flat, layers, strict=False):
        for index, (label, runs) in enumerate(found.items()):
            counts = np.sum([run[layer]["counts"] for run in runs], 0)
            ratio = np.mean([run[layer]["ratio"] for run in runs])
            density = counts / counts.sum() / np.diff(EDGES)
            color = colors[label]
            axes.stairs(np.where(density > 0, density, np.nan), EDGES, color=color, linewidth=1.3, label=label)
            axes.text(
                0.93,
                0.95 - 0.1 * index,
                f"{100 * ratio:{'.2g' if ratio < 0.1 else '.0f'}} %",
                color=color,
                fontsize=TICK - 1.5,
                ha="right",
                va="top",
                transform=axes.transAxes,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
            )
        axes.set_yscale("log")
        axes.set_xlim(1.1 * EDGES[0], 1.1 * EDGES[-1])
        axes.set_title(layer, fontsize=LABEL)
        _plain(axes)
        _label(axes, "", "")
    for axes in grid[-1]:
        axes.set_xlabel("ΔW x / rms(W x)", fontsize=LABEL)
    for axes in grid[:, 0]:
        axes.set_ylabel("density", fontsize=LABEL)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=TICK, frameon=False)
    _title(
        figure,
        f"{title}\nhow far later tasks moved the first task's layer outputs (numbers: root mean square)",
        width,
    )
    return figure


def shades(labels: Sequence[str]) -> dict[str, Any]:
    """Colours that rise with a row's place: of the values of a hyperparameter, or of layers along a network's depth."""
    return {label: colormaps["viridis"](0.88 * i / max(1, len(labels) - 1)) for i, label in enumerate(labels)}


def mean_matrix(matrices: Sequence[AccuracyMatrix]) -> list[list[float | None]]:
    """The mean over seeds of accuracy matrices of one shape; None where a seed has no value."""
    mean = np.stack([_array(matrix) for matrix in matrices]).mean(0)
    return [[float(value) if np.isfinite(value) else None for value in row] for row in mean]


def mean_columns(runs: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[float]]:
    """The mean over seeds of the basis columns per layer after each task."""
    return {key: np.mean([run[key] for run in runs], 0).tolist() for key in runs[0]}


def _array(accuracy: AccuracyMatrix) -> np.ndarray:
    """(tasks, tasks), NaN where nothing was measured; a short or missing row is filled up."""
    n_tasks = max(len(accuracy), *(len(row) for row in accuracy))
    values = np.full((n_tasks, n_tasks), np.nan)
    for i, row in enumerate(accuracy):
        # One row alone is that after the last task: of joint training, say.
        place = n_tasks - 1 if len(accuracy) == 1 else i
        values[place, : len(row)] = [np.nan if value is None else value for value in row]
    return values


def _curve(axes: Axes, curves: np.ndarray, method: str, index: int) -> None:
    """One method's mean over seeds and its band; curves is (seeds, tasks)."""
    color, marker = style(method, index)
    mean = curves.mean(0)
    x = np.arange(len(mean))
    line = {"color": color, "label": METHODS.get(method, method), "linewidth": 1.8, "zorder": 3}
    if np.isfinite(mean).sum() == 1:  # measured once, after all tasks: a level to compare with
        axes.axhline(mean[np.isfinite(mean)][0], linestyle="--", **line)
        return
    axes.plot(x, mean, marker=marker, markersize=5.5, **line)
    if len(curves) > 1:
        std = curves.std(0, ddof=1)
        axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.18, linewidth=0)


def style(method: str, index: int) -> tuple[str, str]:
    """A method's colour and marker, the same in every picture; for an unknown method those of its place."""
    fallback = list(STYLES.values())[index % len(STYLES)]
    return STYLES.get(method, fallback)


def _accuracy_limits(panels: Sequence[Axes]) -> tuple[float, float]:
    """From a round number under the lowest value to one above the highest."""
    lowest, highest = panels[0].dataLim.y0, panels[0].dataLim.y1
    lowest, highest = min(lowest, panels[1].dataLim.y0), max(highest, panels[1].dataLim.y1)
    return max(0.0, 10 * np.floor((lowest - 2) / 10)), min(100.0, 10 * np.ceil((highest + 2) / 10))


def _number_tasks(axes: Axes, n_tasks: int, which: str, every: int | None = None) -> None:
    """Ticks at the tasks, which count from 1 in print; every second one where there are many."""
    every = every or (1 if n_tasks <= 12 else 2)
    ticks = range(0, n_tasks, every) if every == 1 else range(every - 1, n_tasks, every)
    (axes.set_xticks if which == "x" else axes.set_yticks)(list(ticks), [t + 1 for t in ticks])


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _label(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=LABEL)
    axes.set_ylabel(y, fontsize=LABEL)
    axes.tick_params(labelsize=TICK)


def _title(figure: Figure, title: str, width: float) -> None:
    """The title over the whole figure, broken into lines that fit its width in inches."""
    most = max(20, int(width * 13))  # letters of this size per inch, about
    lines = []
    for paragraph in title.split("\n"):
        line = ""
        for word in paragraph.replace(",", ", ").replace(",  ", ", ").split(" "):
            if line and len(line) + 1 + len(word) > most:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        lines.append(line)
    figure.suptitle("\n".join(lines), fontsize=TITLE)
