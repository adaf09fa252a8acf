"""Rows as a table: text, Markdown, LaTeX or CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence
from typing import Any

from report.published import BENCHMARKS, ORDER, Estimate
from report.rows import ORDER_OF_TASKS, Row, order_of, runs_in_words
from report.runs import Problem

NOTHING = "–"
IDENTITY_NOTE = "‡ At test the method uses which task an image is of, beyond the choice of a head."
VALIDATION, FORWARD, CLASS_INCREMENTAL, IDENTITY = "validation %", "FWT", "class-inc. %", " ‡"


def spread(estimate: Estimate | None, form: str) -> str:
    """Mean ± std; the mean alone where there is one run."""
    if estimate is None:
        return NOTHING
    text = format(estimate.mean, form)
    return text if estimate.std is None else f"{text} ± {format(estimate.std, form.lstrip('+'))}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def command(row: Row) -> str:
    """The command that makes a row's runs; several where orders of the tasks have different seeds."""
    if row.benchmark not in BENCHMARKS or row.method not in ORDER:  # of a script that is not here
        return NOTHING
    hyperparameters = row.runs[0].summary.get("hyperparameters", {})
    flags = [] if row.data == "real" else [f"--data {row.data}"]
    for part in [] if row.variant == "default" else row.variant.split(","):
        name = part.partition("=")[0]
        if name in hyperparameters:
            flags.append(_flag(name, hyperparameters[name]))
    flags += ["…"] if "~" in row.variant else []  # a shortened name
    seeds_of: dict[int | None, list[int]] = {}
    for run in sorted(row.runs, key=lambda run: (order_of(run) or 0, run.summary["seed"])):
        seeds_of.setdefault(order_of(run), []).append(run.summary["seed"])
    orders_of: dict[tuple[int, ...], list[int | None]] = {}
    for order, seeds in seeds_of.items():
        orders_of.setdefault(tuple(seeds), []).append(order)
    return " && ".join(_command(row, flags, orders, seeds) for seeds, orders in orders_of.items())


def _command(row: Row, flags: Sequence[str], orders: Sequence[int | None], seeds: Sequence[int]) -> str:
    """One command for each of some orders with each of some seeds."""
    if len(orders) > 1:
        flags = [*flags, f"--sweep {ORDER_OF_TASKS}={','.join(map(str, orders))}"]
    elif orders[0]:
        flags = [*flags, f"--{ORDER_OF_TASKS} {orders[0]}"]
    if len(orders) == len(seeds) == 1:
        return " ".join([f"python main_{row.benchmark}.py --method {row.method}", *flags, f"--seed {seeds[0]}"])
    many = f"--only {row.benchmark} --methods {row.method} --seeds {' '.join(map(str, seeds))}"
    return " ".join(["bash run_experiments.sh paper", many, *flags])


def _flag(name: str, value: Any) -> str:
    if value is True:
        return f"--{name}"
    if isinstance(value, dict):
        value = [f"{key}={count}" for key, count in value.items()]
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def cells(row: Row, marks: str) -> dict[str, str]:
    """A row for people, by column heading."""
    paper = row.published
    return {
        "benchmark": BENCHMARKS.get(row.benchmark, row.benchmark),
        "data": row.data,
        "variant": row.variant,
        "method": row.title + IDENTITY * row.task_identity + marks,
        VALIDATION: spread(row.valid_accuracy, ".2f"),
        "ACC %": spread(row.accuracy, ".2f"),
        "BWT": spread(row.backward_transfer, "+.2f"),
        FORWARD: spread(row.forward_transfer, "+.2f"),
        CLASS_INCREMENTAL: spread(row.class_incremental, ".2f"),
        "paper ACC": spread(paper.accuracy, ".2f") if paper else NOTHING,
        "paper BWT": spread(paper.backward_transfer, "g") if paper else NOTHING,
        "reproduced": row.verdict,
        "runs": runs_in_words(row.runs),
        "time a run": duration(row.seconds),
        "seconds": f"{row.seconds:,.0f}",
        "hardware": row.hardware,
        "commit": ", ".join(row.commits),
        "command": command(row),
    }


ORIGIN = ("commit", "command")  # how a row was made
USUALLY_WITHOUT = ("seconds", *ORIGIN)


def table(
    rows: Sequence[Row], validation: bool = False, without: Collection[str] = USUALLY_WITHOUT
) -> tuple[list[dict[str, str]], list[str]]:
    """Rows of cells, and the lines that belong under them. What is the same in every row is said once, below.

    Args:
        rows: the runs, summed up.
        validation: with the validation accuracy, for a search over hyperparameters.
        without: headings to leave out.
    """
    # On what and by which code a row was made stand together, or both elsewhere.
    of_rows = [[*row.notes, *([row.origin] if row.origin and "hardware" not in without else [])] for row in rows]
    numbered = list(dict.fromkeys(note for some in of_rows for note in some))
    body = []
    for row, some in zip(rows, of_rows, strict=True):
        marks = "".join(f" [{numbered.index(note) + 1}]" for note in dict.fromkeys(some))
        body.append(cells(row, marks))
    notes = [f"[{i}] {note}" for i, note in enumerate(numbered, 1)]
    compared = any(row.published for row in rows)
    dropped = [*without] if compared else [*without, "paper ACC", "paper BWT", "reproduced"]
    dropped += [] if validation else [VALIDATION]
    dropped += [] if any(row.forward_transfer for row in rows) else [FORWARD]
    dropped += [] if any(row.class_incremental for row in rows) else [CLASS_INCREMENTAL]
    for heading in [name for name in ("data", "hardware") if name not in without]:
        if len({line[heading] for line in body}) == 1:
            notes.append(f"{heading.capitalize()}: {body[0][heading]}.")
            dropped.append(heading)
    body = [{heading: cell for heading, cell in line.items() if heading not in dropped} for line in body]
    shown = body[0] if body else ()
    if FORWARD in shown:
        notes.append("FWT: mean over tasks 2 … T of the accuracy just after learning minus a single network's, points.")
    if CLASS_INCREMENTAL in shown:
        notes.append(
            f"{CLASS_INCREMENTAL}: accuracy over all tasks where the network must also tell which task an image is of: "
            "the largest output over the heads of all tasks. ACC is told the task."
        )
    if any(row.task_identity for row in rows):
        notes.append(IDENTITY_NOTE)
    if any(row.data == "embedded" for row in rows):
        notes.append("Embedded data are rendered glyphs, not the published images: no number on them is a paper's.")
    if compared:
        notes.append("Reproduced: |ours - paper| <= max(1, 2 sqrt(s1^2/n1 + s2^2/n2)) points, in ACC and in BWT.")
    return body, notes


def as_text(rows: Sequence[Row], problems: Sequence[Problem], validation: bool = False) -> str:
    """Aligned columns."""
    body, notes = table(rows, validation)
    lines = []
    if body:
        headings = list(body[0])
        width = {h: max(len(h), *(len(line[h]) for line in body)) for h in headings}
        right = {VALIDATION, "ACC %", "BWT", FORWARD, CLASS_INCREMENTAL, "paper ACC", "paper BWT", "time a run"}

        def joined(line: dict[str, str]) -> str:
            return "  ".join(line[h].rjust(width[h]) if h in right else line[h].ljust(width[h]) for h in headings)

        lines = [joined({h: h for h in headings}), "  ".join("-" * width[h] for h in headings), *map(joined, body)]
    return _paragraphs([line.rstrip() for line in lines], notes, problem_lines(problems))


def as_markdown(
    rows: Sequence[Row],
    problems: Sequence[Problem],
    validation: bool = False,
    without: Collection[str] = ("seconds",),
) -> str:
    """A table with the command of each row, and the commit of the code that ran it; arguments as those of `table`."""
    body, notes = table(rows, validation, without)
    for line in body:
        line |= {heading: f"`{line[heading]}`" for heading in ("command",) if heading in line}
    lines = []
    if body:
        lines = markdown_lines(list(body[0]), [list(line.values()) for line in body])
        # Notes mention |ours - paper| and [1]: neither means anything to Markdown outside a table.
    return _paragraphs(lines, [f"{note}  " for note in notes], [f"- {line}" for line in problem_lines(problems)])


def markdown_lines(headings: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines in Markdown."""
    rows = [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in (headings, *lines)]
    return [rows[0], f"|{'---|' * len(headings)}", *rows[1:]]


def as_latex(rows: Sequence[Row], problems: Sequence[Problem], validation: bool = False) -> str:
    """A tabular for the booktabs package, with its notes below; runs without numbers are comments."""
    body, notes = table(rows, validation)
    lines = []
    if body:
        headings = list(body[0])
        lines = [f"\\begin{{tabular}}{{{'l' * len(headings)}}}", "\\toprule"]
        lines += [" & ".join(map(_latex, headings)) + r" \\", "\\midrule"]
        lines += [" & ".join(map(_latex, line.values())) + r" \\" for line in body]
        lines += ["\\bottomrule", "\\end{tabular}"]
    below = [f"{{\\footnotesize {_latex(note)}\\par}}" for note in notes] if body else []
    return _paragraphs([*lines, *below], [f"% {line}" for line in problem_lines(problems)])


def _latex(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: f"${c}$" for c in "<>|"}
    special |= {"‡": r"$\ddagger$", "±": r"$\pm$", "–": "--", "…": r"\ldots{}"}
    text = "".join(special.get(c, c) for c in text)
    return f"${text[0]}$" + text[1:] if text[:1] in ("-", "+") and text[1:2].isdigit() else text


def as_csv(rows: Sequence[Row], problems: Sequence[Problem], validation: bool = True) -> str:
    """Every number, unrounded; runs that are not finished, or damaged, are rows without numbers."""

    def numbers(estimate: Estimate | None, name: str) -> dict[str, Any]:
        return {name: estimate and estimate.mean, f"{name}_std": estimate and estimate.std}

    blank: dict[str, Any] = {"status": "finished"}
    lines = []
    for row in rows:
        lines.append(
            blank
            | {"benchmark": row.benchmark, "data": row.data, "variant": row.variant, "method": row.method}
            | numbers(row.accuracy, "average_accuracy")
            | numbers(row.backward_transfer, "backward_transfer")
            | numbers(row.forward_transfer, "forward_transfer")
            | numbers(row.class_incremental, "class_incremental")
            | (numbers(row.valid_accuracy, "valid_accuracy") if validation else {})
            | {"n": len(row.runs), "seeds": " ".join(map(str, row.seeds)), "orders": " ".join(map(str, row.orders))}
            | {"seconds": row.seconds}
            | {"hardware": row.hardware}
            | numbers(row.published and row.published.accuracy, "paper_average_accuracy")
            | numbers(row.published and row.published.backward_transfer, "paper_backward_transfer")
            | {
                "reproduced": row.verdict,
                "notes": "; ".join(filter(None, [*row.notes, row.origin])),
                "command": command(row),
                "path": "",
            }
            | {"task_identity": row.task_identity, "commit": " ".join(row.commits)}
        )
    headings = list(lines[0]) if lines else ["status", "notes", "path"]
    lines += [{"status": p.status, "notes": p.reason, "path": str(p.path)} for p in problems]
    text = io.StringIO()
    writer = csv.DictWriter(text, headings, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def problem_lines(problems: Sequence[Problem]) -> list[str]:
    """A line for each run without numbers."""
    return [f"{problem.status}: {problem.path} ({problem.reason})" for problem in problems]


def _paragraphs(*parts: Sequence[str]) -> str:
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


FORMATS = {"text": as_text, "markdown": as_markdown, "latex": as_latex, "csv": as_csv}
