"""Accuracy: the matrix as a heat map, and methods over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from engine.metrics import AccuracyMatrix, n_tasks
from report.plots.style import LABEL, TICK, Look, Looks, label_axes, look, number_tasks, plain, set_title


def accuracy_heat_map(accuracy: AccuracyMatrix, title: str) -> Figure:
    """Test accuracy on task j (columns) after learning task i (rows), percent, with the values in the cells."""
    values = as_array(accuracy)
    n = len(values)
    cell = 0.52 if n <= 12 else 0.42  # inches
    side = max(2.2, cell * n)
    figure = Figure(figsize=(side + 1.9, side + 1.0), layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
    form = "{:.1f}" if n <= 12 else "{:.0f}"
    for i, j in np.argwhere(np.isfinite(values)):
        color = "black" if values[i, j] > 60 else "white"
        axes.text(j, i, form.format(values[i, j]), ha="center", va="center", color=color, fontsize=9)
    number_tasks(axes, n, "x", every=1)
    number_tasks(axes, n, "y", every=1)
    axes.set_xlim(-0.5, n - 0.5)
    axes.spines[["top", "right"]].set_visible(False)
    label_axes(axes, "tested on task", "after learning task")
    bar = figure.colorbar(picture, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("test accuracy, %", fontsize=LABEL)
    bar.ax.tick_params(labelsize=TICK)
    set_title(figure, title, side + 1.9)
    return figure


def accuracy_over_time(
    matrices: Mapping[str, Sequence[AccuracyMatrix]], title: str, looks: Looks | None = None
) -> Figure:
    """Accuracy on task 1, and on average over the tasks learned so far, as tasks are added.

    Args:
        matrices: of each method, by its name in the legend, the accuracy matrices of its seeds.
        title: what was run.
        looks: of the methods; by their order where not given.
    Returns:
        two panels; lines are means over seeds, bands one standard deviation.
    """
    width = 9.6
    figure = Figure(figsize=(width, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    most = max(n_tasks(matrix) for seeds in matrices.values() for matrix in seeds)
    for index, (method, seeds) in enumerate(matrices.items()):
        stack = np.stack([as_array(matrix) for matrix in seeds])  # (seeds, tasks, tasks)
        measured = np.isfinite(stack)
        counts = measured.sum(2)
        averages = np.where(measured, stack, 0).sum(2) / np.maximum(counts, 1)
        averages = np.where(counts > 0, averages, np.nan)  # (seeds, tasks)
        for axes, curves in zip(panels, (stack[:, :, 0], averages), strict=True):
            _curve(axes, curves, method, (looks or {}).get(method, look(None, index)))
    for axes, name in zip(panels, ("Task 1", "Average of the tasks so far"), strict=True):
        axes.set_title(name, fontsize=LABEL)
        number_tasks(axes, most, "x")
        axes.set_xlim(-0.3, max(most - 0.7, 0.3))
        plain(axes)
        label_axes(axes, "tasks learned", "")
    panels[0].set_ylabel("test accuracy, %", fontsize=LABEL)
    panels[0].set_ylim(*_accuracy_limits(panels))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=TICK, frameon=False)
    set_title(figure, title, width)
    return figure


def mean_matrix(matrices: Sequence[AccuracyMatrix]) -> list[list[float | None]]:
    """The mean over seeds of accuracy matrices of one shape; None where a seed has no value."""
    mean = np.stack([as_array(matrix) for matrix in matrices]).mean(0)
    return [[float(value) if np.isfinite(value) else None for value in row] for row in mean]


def as_array(accuracy: AccuracyMatrix) -> np.ndarray:
    """(tasks, tasks), NaN where nothing was measured; a short or missing row is filled up."""
    n = n_tasks(accuracy)
    values = np.full((n, n), np.nan)
    for i, row in enumerate(accuracy):
        # One row alone is that after the last task: of joint training, say.
        place = n - 1 if len(accuracy) == 1 else i
        values[place, : len(row)] = [np.nan if value is None else value for value in row]
    return values


def _curve(axes: Axes, curves: np.ndarray, label: str, look: Look) -> None:
    """One method's mean over seeds and its band; curves is (seeds, tasks)."""
    color, marker = look
    mean = curves.mean(0)
    x = np.arange(len(mean))
    line = {"color": color, "label": label, "linewidth": 1.8, "zorder": 3}
    if np.isfinite(mean).sum() == 1:  # measured once, after all tasks: a level to compare with
        axes.axhline(mean[np.isfinite(mean)][0], linestyle="--", **line)
        return
    axes.plot(x, mean, marker=marker, markersize=5.5, **line)
    if len(curves) > 1:
        std = curves.std(0, ddof=1)
        axes.fill_between(x, mean - std, mean + std, color=color, alpha=0.18, linewidth=0)


def _accuracy_limits(panels: Sequence[Axes]) -> tuple[float, float]:
    """From a round number under the lowest value to one above the highest."""
    lowest, highest = panels[0].dataLim.y0, panels[0].dataLim.y1
    lowest, highest = min(lowest, panels[1].dataLim.y0), max(highest, panels[1].dataLim.y1)
    return max(0.0, 10 * np.floor((lowest - 2) / 10)), min(100.0, 10 * np.ceil((highest + 2) / 10))
