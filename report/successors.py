"""GPM beside the methods that came after it: what they reach, what is published, and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import groupby

from report.published import ALWAYS, BENCHMARKS, ORDER, SUCCESSORS, place_in
from report.rows import Row
from report.runs import Problem
from report.tables import IDENTITY_NOTE, NOTHING, cells, markdown_lines

HEADINGS = ("method", "variant", "ACC %", "BWT", "paper ACC", "paper BWT", "source", "reproduced")
COSTS = ("numbers stored", "time a run", "runs")


def successor_tables(rows: Sequence[Row], problems: Sequence[Problem]) -> str:
    """A heading and a table for each benchmark that one of GPM's successors ran on."""
    parts = []
    for benchmark, members in groupby((row for row in rows if row.data == "real"), lambda row: row.benchmark):
        shown = list(members)
        variants = {"default"} | {row.variant for row in shown if row.method in SUCCESSORS}
        shown = [row for row in shown if row.method in SUCCESSORS or (row.method in ALWAYS and row.variant in variants)]
        if any(row.method in SUCCESSORS for row in shown):
            shown.sort(key=lambda row: (row.variant != "default", row.variant, place_in(ORDER, row.method)))
            parts += [f"## {BENCHMARKS.get(benchmark, benchmark)}", _table(shown)]
    return "\n\n".join([*parts, IDENTITY_NOTE]) + "\n" if parts else ""


def _table(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        found = cells(row, "") | {"source": row.published.source if row.published else NOTHING}
        stored = [run.summary.get("memory_floats") for run in row.runs]
        found["numbers stored"] = NOTHING if None in stored else f"{statistics.fmean(stored):,.0f}"
        lines.append([found[heading] for heading in HEADINGS + COSTS])
    return "\n".join(markdown_lines(HEADINGS + COSTS, lines))
