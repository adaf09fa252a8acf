"""How far later tasks moved an old task's layer outputs (paper Figure 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gradproj.interference import EDGES
from report.plots.style import LABEL, TICK, label_axes, plain, set_title

MOST_PANELS = 6


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
    height = max(2.5, 0.9 + 0.17 * len(found))  # a line of numbers for each row fits into a panel
    figure = Figure(figsize=(width, height * down + 0.7), layout="constrained")
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
                0.97 - min(0.1, 0.94 / len(found)) * index,
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
        plain(axes)
        label_axes(axes, "", "")
    for axes in grid[-1]:
        axes.set_xlabel("ΔW x / rms(W x)", fontsize=LABEL)
    for axes in grid[:, 0]:
        axes.set_ylabel("density", fontsize=LABEL)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", fontsize=TICK, frameon=False)
    set_title(
        figure,
        f"{title}\nhow far later tasks moved the first task's layer outputs (numbers: root mean square)",
        width,
    )
    return figure
