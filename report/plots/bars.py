"""Methods beside each other, and scores over a hyperparameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from report.plots.style import TICK, Looks, label_axes, look, plain, set_title
from report.published import Estimate
from report.rows import Row


def bars(
    scores: Mapping[str, tuple[Estimate | None, ...]],
    headings: Sequence[str],
    title: str,
    signed: Sequence[bool] = (False, False),
    looks: Looks | None = None,
) -> Figure:
    """Numbers of each method, a panel for each kind, error bars one standard deviation over seeds.

    Args:
        scores: of each method, by its name on the axis, one number for each panel; None where it has no meaning.
        headings: of the panels: what is measured, and its unit.
        title: what was run.
        signed: for each panel, whether the numbers at the bars show a plus.
        looks: of the methods; by their order where not given.
    """
    width = max(6.4, 2.4 + 0.95 * len(scores))
    figure = Figure(figsize=(width, 4.0), layout="constrained")
    panels = figure.subplots(1, len(headings))
    names = list(scores)
    for part, (axes, heading) in enumerate(zip(panels, headings, strict=True)):
        estimates = [pair[part] for pair in scores.values()]
        means = [0.0 if e is None else e.mean for e in estimates]
        errors = [0.0 if e is None else e.std or 0.0 for e in estimates]
        lowest = min(0.0, *(m - e for m, e in zip(means, errors, strict=True)))
        highest = max(0.0, *(m + e for m, e in zip(means, errors, strict=True)))
        span = highest - lowest
        span = max(span, 1.0) if signed[part] else span or 1.0  # less than a point should look like little
        room = 0.14 * span  # for the numbers at the bars' ends
        digits = min(2 if signed[part] else 4, max(1, 2 - int(np.floor(np.log10(span)))))  # of the largest, three
        for x, (method, estimate) in enumerate(zip(scores, estimates, strict=True)):
            if estimate is None:
                axes.text(x, 0.1 * room, "–", ha="center", va="bottom", fontsize=TICK)
                continue
            color = (looks or {}).get(method, look(None, x)).color
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
        above = any(e is None or e.mean >= 0 for e in estimates)
        axes.set_ylim(min(lowest - room * (lowest < 0), highest - span), highest + room * above)
        turned = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if len(names) > 4 else {}
        axes.set_xticks(range(len(names)), names, **turned)
        plain(axes)
        axes.grid(axis="x", visible=False)
        label_axes(axes, "", heading)
    set_title(figure, title, width)
    return figure


def scores_against(labels: Sequence[str], rows: Sequence[Row], name: str, title: str) -> Figure:
    """ACC and BWT over the values of a hyperparameter, error bars one standard deviation over seeds.

    Args:
        labels: the values, ascending, drawn at equal distances.
        rows: one for each value.
        name: of the hyperparameter.
        title: what was run.
    """
    width = max(6.4, 3.2 + 0.9 * len(labels))
    figure = Figure(figsize=(width, 3.8), layout="constrained")
    kinds = (("accuracy", "ACC, %"), ("backward_transfer", "BWT, points"))
    color, marker = look(rows[0].place, 0)
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
        low, high = axes.get_ylim()
        missing = max(0.0, 1.0 - (high - low)) / 2  # less than a point of percent should look like little
        axes.set_ylim(low - missing, high + missing)
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.4, len(labels) - 0.6)
        plain(axes)
        label_axes(axes, name, heading)
    set_title(figure, title, width)
    return figure
