"""One HTML file that holds everything a set of runs says, to be sent to others: no network, no other files.

The tables are sorted and searched by DataTables, which the package itables ships whole (0.7 MB); all else is plain HTML
and CSS, and the pictures are those of `report.plots` as SVG, so that a page without its scripts is still complete.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from engine.files import write_text
from engine.metrics import AccuracyMatrix
from engine.record import scores_in_words
from gradproj.errors import InputError
from report import tables
from report.plots.draw import draw_pictures
from report.plots.style import as_svg
from report.published import BENCHMARKS
from report.rows import Row, runs_in_words
from report.runs import LOCAL_ONLY, Problem, Run

TEMPLATE = Path(__file__).with_name("page.html.jinja")
MATRICES = {
    "accuracy": "Test accuracy, %",
    "class_incremental": "Class-incremental: the network is not told which task an image is of, %",
}

SAID_ELSEWHERE = ("benchmark", "data", *tables.USUALLY_WITHOUT)  # in headings, and in the fold of commands


def write_report(path: Path, rows: Sequence[Row], problems: Sequence[Problem], against: str | None = None) -> None:
    """Write the file, whole or not at all.

    Args:
        path: where to.
        rows: the runs, summed up.
        problems: runs without numbers.
        against: a hyperparameter that some rows differ in alone; scores are drawn over it too.
    Raises:
        InputError: a package is missing, or the file cannot be written.
    """
    try:
        import jinja2

        datatables = resources.files("itables") / "html"
        script, style = ((datatables / name).read_bytes() for name in ("dt_bundle.js", "dt_bundle.css"))
    except (ImportError, FileNotFoundError) as error:
        raise InputError(f"--html needs two more packages ({error}): pip install 'itables>=2.9,<3' jinja2") from error
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        n_runs=sum(len(row.runs) for row in rows),
        sections=sections(rows, against),
        problems=tables.problem_lines(problems),
        datatables_script=_data_url("text/javascript", script),
        datatables_style=_data_url("text/css", style),
    )
    write_text(path, page)


def sections(rows: Sequence[Row], against: str | None = None) -> list[dict[str, Any]]:
    """What the page shows of each benchmark and kind of data."""
    found = []
    for (benchmark, data), group in groupby(rows, lambda row: (row.benchmark, row.data)):
        members = list(group)
        body, notes = tables.table(members, validation=bool(against), without=SAID_ELSEWHERE)
        numbers = [sorted_by(row) for row in members]
        found.append(
            {
                "id": f"{benchmark}-{data}",
                "title": f"{BENCHMARKS.get(benchmark, benchmark)}, {data} data",
                "headings": list(body[0]),
                "lines": [
                    [(heading, cell, number.get(heading)) for heading, cell in line.items()]
                    for line, number in zip(body, numbers, strict=True)
                ],
                "notes": notes,
                "commands": [tables.cells(row, "") for row in members],
                "pictures": pictures(members, against),
                "runs": [shown_run(row, run) for row in members for run in row.runs],
            }
        )
    return found


def sorted_by(row: Row) -> dict[str, float]:
    """What a row's cells of numbers are sorted by; -1e9 where there is none."""
    paper = row.published
    estimates = {
        tables.VALIDATION: row.valid_accuracy,
        "ACC %": row.accuracy,
        "BWT": row.backward_transfer,
        tables.FORWARD: row.forward_transfer,
        tables.CLASS_INCREMENTAL: row.class_incremental,
        "paper ACC": paper and paper.accuracy,
        "paper BWT": paper and paper.backward_transfer,
    }
    return {heading: e.mean if e else -1e9 for heading, e in estimates.items()} | {"time a run": row.seconds}


def pictures(rows: Sequence[Row], against: str | None) -> list[dict[str, Any]]:
    """The pictures of some rows as data URLs, but for the heat maps: the runs' matrices are tables here."""
    found = []

    def keep(figure: Figure, name: str) -> None:
        if not name.endswith("-accuracy"):
            wide = figure.get_figwidth() > 3 * figure.get_figheight()  # takes the whole width of the page
            found.append({"name": name, "url": _data_url("image/svg+xml", as_svg(figure)), "wide": wide})

    draw_pictures(rows, keep, against)
    return found


def shown_run(row: Row, run: Run) -> dict[str, Any]:
    """One run: its matrices, and its configuration in folds."""
    summary = run.summary
    names = [task["name"] for task in summary.get("tasks") or []]
    options = {k: v for k, v in summary.get("hyperparameters", {}).items() if k not in LOCAL_ONLY}
    origin = {key: summary.get(key) for key in ("device", "versions", "commit", "seconds")}
    return {
        "title": f"{row.title}, {row.variant}, {runs_in_words([run])}",
        "scores": f"{scores_in_words(summary)}, {tables.duration(summary['seconds']['total'])}",
        "matrices": [
            {"caption": caption, "rows": matrix_cells(summary[name], names)}
            for name, caption in MATRICES.items()
            if summary.get(name)
        ],
        "configuration": {name: json.dumps(value, ensure_ascii=False) for name, value in (options | origin).items()},
    }


def matrix_cells(accuracy: AccuracyMatrix, names: Sequence[str] = ()) -> list[list[dict[str, str] | None]]:
    """The cells of an accuracy matrix: text, colours and what the mouse shows; None where nothing was measured."""

    def task(number: int) -> str:
        return f"task {number + 1}" + (f" ({names[number]})" if number < len(names) else "")

    def cell(i: int, j: int, value: float) -> dict[str, str]:
        ground = to_hex(colormaps["viridis"](value / 100))
        return {
            "text": f"{value:.1f}",
            "style": f"background:{ground};color:{'#000' if value > 60 else '#fff'}",
            "tip": f"{value:.2f} % on {task(j)} after learning {task(i)}",
        }

    return [[None if x is None else cell(i, j, x) for j, x in enumerate(row)] for i, row in enumerate(accuracy)]


def _data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
