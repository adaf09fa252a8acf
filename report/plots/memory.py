"""Growth of a memory, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from report.plots.style import MARKERS, label_axes, number_tasks, plain, set_title, shades


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
    number_tasks(axes, n_tasks, "x")
    axes.set_xlim(-0.3, max(n_tasks - 0.7, 0.3))
    axes.set_ylim(0, 100)
    plain(axes)
    label_axes(axes, "tasks learned", "memory, % of the layer's input dimensions")
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
    set_title(figure, title, width)
    return figure


def mean_columns(runs: Sequence[Mapping[str, Sequence[int]]]) -> dict[str, list[float]]:
    """The mean over seeds of the basis columns per layer after each task, of the layers that all runs have alike."""
    shared = [key for key in runs[0] if all(len(run.get(key, ())) == len(runs[0][key]) for run in runs)]
    return {key: np.mean([run[key] for run in runs], 0).tolist() for key in shared}
