"""What all pictures have in common: colours, type sizes, titles, and how they are written.

Every drawing function returns a Matplotlib figure and leaves Matplotlib's global state alone; `save` writes it.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from gradproj.files import write_atomically


class Look(NamedTuple):
    """How a method is drawn, the same in every picture."""

    color: str
    marker: str


# By place (Method.place): the eight colours of Okabe and Ito, which colour-blind readers tell apart, then others.
LOOKS = (
    *(Look("#0072B2", "o"), Look("#D55E00", "s"), Look("#000000", "*"), Look("#777777", "P"), Look("#E69F00", "^")),
    *(Look("#56B4E9", "v"), Look("#009E73", "D"), Look("#CC79A7", "X"), Look("#8C6D1F", "<"), Look("#44337A", ">")),
    *(Look("#2B7A78", "d"), Look("#A4243B", "h"), Look("#5F8D2E", "p"), Look("#B07AA1", "8"), Look("#1B4965", "H")),
    *(Look("#D4A017", "v"), Look("#6A0DAD", "^"), Look("#8FA3B8", "s"), Look("#81B29A", "o"), Look("#E07A5F", "D")),
)
Looks = Mapping[str, Look]  # by label
MARKERS = "os^DvPX<>*"
TITLE, LABEL, TICK = 11, 10.5, 9.5  # font sizes, points


def look(place: int | None, index: int) -> Look:
    """The look of a place; where it is unknown, of an index."""
    return LOOKS[(index if place is None else place) % len(LOOKS)]


# What would make each writing of a picture another file.
LEFT_OUT = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
# In a PDF letters stay letters: searchable, and accepted by publishers.
SETTINGS = {"pdf.fonttype": 42, "svg.hashsalt": "gradproj"}


def save(figure: Figure, path: Path) -> None:
    """Write a figure, whole or not at all, in the format that the file name ends with (png, pdf, svg)."""
    write_atomically(path, lambda file: _write(figure, file, path.suffix.lstrip(".") or "png"))


def as_svg(figure: Figure) -> bytes:
    """A figure as an SVG document."""
    file = io.BytesIO()
    _write(figure, file, "svg")
    return file.getvalue()


def _write(figure: Figure, file: BinaryIO, kind: str) -> None:
    FigureCanvasAgg(figure)  # no window system, and no global state as with pyplot
    with rc_context(SETTINGS):
        figure.savefig(file, format=kind, dpi=160, bbox_inches="tight", pad_inches=0.08, metadata=LEFT_OUT.get(kind))


def shades(labels: Sequence[str]) -> dict[str, Any]:
    """Colours that rise with a row's place: of the values of a hyperparameter, or of layers along a network's depth."""
    return {label: colormaps["viridis"](0.88 * i / max(1, len(labels) - 1)) for i, label in enumerate(labels)}


def number_tasks(axes: Axes, n_tasks: int, which: str, every: int | None = None) -> None:
    """Ticks at the tasks, which count from 1 in print; every second one where there are many."""
    every = every or (1 if n_tasks <= 12 else 2)
    ticks = range(0, n_tasks, every) if every == 1 else range(every - 1, n_tasks, every)
    (axes.set_xticks if which == "x" else axes.set_yticks)(list(ticks), [t + 1 for t in ticks])


def plain(axes: Axes) -> None:
    """A light grid and no frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def label_axes(axes: Axes, x: str, y: str) -> None:
    """Names of both axes."""
    axes.set_xlabel(x, fontsize=LABEL)
    axes.set_ylabel(y, fontsize=LABEL)
    axes.tick_params(labelsize=TICK)


def set_title(figure: Figure, title: str, width: float) -> None:
    """The title over the whole figure, broken into lines that fit its width in inches."""
    most = max(20, int(width * 13))  # letters of this size per inch, about
    paragraphs = [re.sub(r",(?=\S)", ", ", paragraph) for paragraph in title.split("\n")]
    lines = [
        line
        for text in paragraphs
        for line in textwrap.wrap(text, most, break_long_words=False, break_on_hyphens=False)
    ]
    figure.suptitle("\n".join(lines), fontsize=TITLE)
