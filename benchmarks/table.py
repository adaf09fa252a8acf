"""The recorded measurements as Markdown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
HEADER = (
    "| | step alone, ms | projected, ms | ratio | dense, ms | ratio | floor, ms | memory update, s | plain | "
    "evaluation, images/s | epoch, s (dense) |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)


def markdown(results: dict[str, Any]) -> str:
    """One table: a row for each benchmark and form of its training step."""
    environments = [result["environment"] for result in results.values()]
    lines = [*HEADER]
    for result in results.values():
        lines += rows(result)
    estimated = any(result["epoch"]["how"] != "measured" for result in results.values())
    notes = ["", "≈: estimated from its steps."] if estimated else []
    return "\n".join([*dict.fromkeys(map(describe, environments)), "", *lines, *notes])


def describe(environment: dict[str, Any]) -> str:
    """Where and when it was measured."""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    clock = "" if environment["clock"] == "wall" else "; processor time on a busy machine, provisional"
    date, commit = environment["date"], environment["commit"] or "no commit"
    return f"Measured {date} on {environment['hardware']} ({versions}, {commit}{clock})."


def rows(result: dict[str, Any]) -> list[str]:
    """The rows of one benchmark; what belongs to no form of its step stands in the first."""
    lines = []
    for i, (form, step) in enumerate(result["steps"].items()):
        dense = step["seconds"].get("dense")
        cells = [
            f"{result['title']}, batch {result['batch_size']}{threads(result)}, {form}",
            milliseconds(step["seconds"]["alone"]["median"]),
            milliseconds(step["seconds"]["projected"]["median"]),
            ratio(step["ratio"]["projected"]),
            milliseconds(dense["median"]) if dense else "",
            ratio(step["ratio"]["dense"]) if dense else "",
            *(shared(result) if i == 0 else [""] * 5),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def threads(result: dict[str, Any]) -> str:
    """How many CPU threads; nothing on a GPU."""
    n = result["threads"]
    return "" if n is None else f", {n} thread{'s' if n > 1 else ''}"


def shared(result: dict[str, Any]) -> list[str]:
    """Floor, memory update, plain memory update, evaluation and epoch."""
    memory, epoch = result["memory"], result["epoch"]
    layers = "" if memory["plain_layers"] == "all" else f" on {len(memory['plain_layers'])} layers"
    return [
        milliseconds(result["floor"]["seconds"]),
        f"{memory['later']['median']:.2g} (first task {memory['first']['median']:.2g})",
        f"{memory['plain']['median']:.3g} s{layers}, {ratio(memory['ratio'], '.0f')}×",
        f"{result['evaluation_images_per_second']:,.0f}",
        f"{'' if epoch['how'] == 'measured' else '≈ '}{epoch['projected']:.3g} ({epoch['dense']:.3g})",
    ]


def milliseconds(seconds: float) -> str:
    """Three digits."""
    return f"{1000 * seconds:.3g}"


def ratio(spread: dict[str, float], form: str = ".2f") -> str:
    """Median and quartiles."""
    median, low, high = (format(spread[name], form) for name in ("median", "low", "high"))
    return f"{median} ({low}–{high})"


def all_results(folder: Path) -> str:
    """Every full measurement recorded in a folder."""
    paths = sorted(path for path in folder.glob("*.json") if not path.stem.endswith("-quick"))
    recorded = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    parts = [markdown(results) for results in recorded]
    devices = {result["environment"]["device"] for results in recorded for result in results.values()}
    if "cuda" not in devices:
        parts.append("No GPU was at hand: GPU figures are missing because none was measured.")
    return "\n\n".join(parts)


def rewrite(path: Path, text: str) -> None:
    """Replace what stands between the markers of a file.

    Raises:
        ValueError: the file has no pair of markers.
    """
    content = path.read_text(encoding="utf-8")
    if content.count(BEGIN) != 1 or content.count(END) != 1 or content.index(BEGIN) > content.index(END):
        raise ValueError(f"{path} must hold {BEGIN} and, after it, {END}, once each")
    before, rest = content.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8")
