"""The pictures of one run, in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report.plots.accuracy import accuracy_heat_map
from report.plots.memory import memory_growth
from report.plots.style import save
from report.published import BENCHMARKS


def draw_run(summary: dict[str, Any]) -> list[Path]:
    """Draw a run's accuracy matrix and the growth of its memory.

    Args:
        summary: what `engine.experiment.run` returned.
    Returns:
        the files written: accuracy.png, and memory.png of methods with bases.
    """
    folder, title = Path(summary["folder"]), run_title(summary)
    pictures = {"accuracy.png": accuracy_heat_map(summary["accuracy"], title)}
    columns, sizes = summary.get("memory_columns"), summary.get("memory_input_sizes")
    if columns and sizes:
        pictures["memory.png"] = memory_growth(columns, sizes, title)
    for name, figure in pictures.items():
        save(figure, folder / name)
    return [folder / name for name in pictures]


def run_title(summary: dict[str, Any]) -> str:
    """What a run's pictures show."""
    benchmark, kind = summary["benchmark"], summary["variant"]
    names = f"{BENCHMARKS.get(benchmark, benchmark)} ({summary['data']['kind']} data), {summary['title']}"
    return f"{names}, seed {summary['seed']}" + ("" if kind == "default" else f"\n{kind}")
