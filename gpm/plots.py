"""Pictures of a run: the accuracy matrix and the growth of the memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gpm.files import write_atomically
from gpm.metrics import AccuracyMatrix


def save(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, whole or not at all."""
    FigureCanvasAgg(figure)  # no window system, and no global state as with pyplot
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=150))


def accuracy_heat_map(accuracy: AccuracyMatrix, title: str) -> Figure:
    """Test accuracy on task j (columns) after learning task i (rows), percent, with the values in the cells."""
    n_tasks = len(accuracy)
    side = max(3.5, 0.55 * n_tasks + 1.2)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    values = [[float("nan") if value is None else value for value in row] for row in accuracy]
    picture = axes.imshow(values, vmin=0, vmax=100, cmap="viridis")
    for i, row in enumerate(accuracy):
        for j, value in enumerate(row):
            if value is not None:
                color = "black" if value > 60 else "white"
                axes.text(j, i, f"{value:.1f}", ha="center", va="center", color=color, fontsize=8)
    numbers = range(1, n_tasks + 1)
    axes.set_xticks(range(n_tasks), numbers)
    axes.set_yticks(range(n_tasks), numbers)
    axes.set(xlabel="tested on task", ylabel="after learning task", title=title)
    figure.colorbar(picture, ax=axes, label="test accuracy, %", shrink=0.8)
    return figure


def memory_growth(columns: Mapping[str, Sequence[int]], sizes: Mapping[str, int], title: str) -> Figure:
    """Basis columns over input size (k/d, percent) of each layer after each task."""
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    markers = "osD^v<>pX*"
    for index, (key, counts) in enumerate(columns.items()):
        percent = [100 * k / sizes[key] for k in counts]
        # The colour runs along the depth of the network; markers tell neighbours apart without it.
        color = colormaps["viridis"](0.9 * index / max(1, len(columns) - 1))
        label = f"{key} (d = {sizes[key]})"
        axes.plot(range(1, len(counts) + 1), percent, marker=markers[index % len(markers)], color=color, label=label)
    n_tasks = max(map(len, columns.values()))
    axes.set_xticks(range(1, n_tasks + 1))
    axes.set(xlabel="tasks learned", ylabel="memory, % of input dimensions", ylim=(0, 103), title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=7 if len(columns) > 12 else 8)
    return figure
