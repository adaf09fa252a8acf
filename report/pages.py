"""Tables inside Markdown pages: the README's short one, and the page of all results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from engine.files import write_text
from gradproj.errors import InputError
from report.published import ALWAYS, BENCHMARKS, ORDER, place_in
from report.rows import Row
from report.runs import Problem
from report.successors import successor_tables
from report.tables import CLASS_INCREMENTAL, FORWARD, ORIGIN, as_markdown

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# What the short table leaves to the page of all results, and what that page leaves out.
LEFT_TO_THE_PAGE = (FORWARD, CLASS_INCREMENTAL, "seconds", "hardware", *ORIGIN)
LEFT_OUT = ("benchmark", "time a run")


def short_table(rows: Sequence[Row], problems: Sequence[Problem]) -> str:
    """The rows that are compared with a paper's, and GPM's and naive's of each benchmark that come closest to it."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.benchmark, row.method
        if row.data == "real" and (key not in best or closeness(row) > closeness(best[key])):
            best[key] = row
    rows = [row for row in best.values() if row.compared or row.method in ALWAYS]
    chosen = sorted(rows, key=lambda row: (place_in(BENCHMARKS, row.benchmark), place_in(ORDER, row.method)))
    return as_markdown(chosen, problems, without=LEFT_TO_THE_PAGE)


def closeness(row: Row) -> tuple:
    """How near a row is to what a paper did; the larger, the nearer."""
    variants = row.published.variants if row.published else ("default",)
    return row.variant in variants, len(row.runs), row.seconds


def all_tables(rows: Sequence[Row], problems: Sequence[Problem]) -> str:
    """A heading and a table for each benchmark, with every row."""
    parts = []
    for benchmark, members in groupby(rows, lambda row: row.benchmark):
        parts.append(f"## {BENCHMARKS.get(benchmark, benchmark)}\n\n{as_markdown(list(members), [], without=LEFT_OUT)}")
    if problems:
        parts.append(as_markdown([], problems))
    return "\n".join(parts)


Table = Callable[[Sequence[Row], Sequence[Problem]], str]
PAGES: dict[str, Table] = {"readme": short_table, "page": all_tables, "successors": successor_tables}


def block(text: str) -> str:
    """A table between its markers."""
    return f"{BEGIN}\n{text}{END}"


def split_page(text: str) -> tuple[str, str, str] | None:
    """A page before, at and after its block of results; None if it has no such markers."""
    head, begin, after = text.partition(BEGIN)
    middle, end, tail = after.partition(END)
    return (head, begin + middle + end, tail) if begin and end else None


def update_page(path: Path, kind: str, rows: Sequence[Row], problems: Sequence[Problem]) -> None:
    """Replace the block of results of a page.

    Args:
        path: of the page.
        kind: one of PAGES.
        rows, problems: of the runs.
    Raises:
        InputError: it cannot be read or written, has no markers, or there is no table to put between them.
    """
    if not PAGES[kind](rows, []).strip():
        raise InputError(f"none of these runs is one of those that {path} shows; it is left as it is")
    try:
        parts = split_page(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if parts is None:
        raise InputError(f"{path} has no lines {BEGIN} and {END} to put the table between")
    write_text(path, parts[0] + block(PAGES[kind](rows, problems)) + parts[2])
