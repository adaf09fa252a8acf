"""One table from any set of run folders: mean ± std over seeds, beside what the paper reports.

python -m gpm.report runs                                  # every run under runs/, as text
python -m gpm.report runs/real --format latex              # or markdown, csv
python -m gpm.report runs --plots figures                  # PNG and PDF of every comparison
python -m gpm.report runs/real --collect results           # copy finished summaries into results/
python -m gpm.report results --readme README.md            # rewrite the README's table from them
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from gpm.cli import Parser
from gpm.errors import InputError
from gpm.files import write_json, write_text
from gpm.published import BENCHMARKS, METHODS, PUBLISHED, Estimate, Published, reproduced

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
NOTHING = "–"
LOCAL_ONLY = ("data_dir", "output_dir", "quiet")  # paths and taste of one machine, left out of collected summaries


class Run(NamedTuple):
    """A finished run."""

    path: Path
    summary: dict[str, Any]


class Problem(NamedTuple):
    """A run that gives no numbers."""

    path: Path
    status: str  # "unfinished" or "damaged"
    reason: str


@dataclass
class Row:
    """The runs that differ in their seed alone."""

    benchmark: str
    data: str
    variant: str
    method: str
    runs: list[Run]
    accuracy: Estimate
    backward_transfer: Estimate | None
    seconds: float
    hardware: str
    published: Published | None = None
    verdict: str = NOTHING  # "yes", "no …", or why the row cannot be compared
    notes: list[str] = field(default_factory=list)

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted(run.summary["seed"] for run in self.runs)


# ---- reading


def find_runs(paths: Iterable[Path]) -> tuple[list[Run], list[Problem]]:
    """All runs at or under some paths.

    Args:
        paths: run folders, folders that hold them at any depth, or summary files.
    Returns:
        finished runs, and the ones that are unfinished or damaged, each in path order.
    Raises:
        InputError: a path does not exist, or there is no run under it.
    """
    runs, problems = {}, {}
    for path in paths:
        if not path.exists():
            raise InputError(f"{path} does not exist; give run folders, or a folder that holds them")
        found = set()
        try:
            files = [path] if path.is_file() else path.rglob("*.json")
            for file in files:
                if file.name == "config.json":
                    found.add(file.parent / "summary.json")  # which may not exist yet
                elif file == path or file.name == "summary.json" or file.name.startswith("seed-"):
                    found.add(file)
        except OSError as error:
            raise InputError(f"cannot read {path}: {error.strerror or error}") from error
        if not found:
            raise InputError(f"no run under {path}: no summary.json, config.json or seed-N.json")
        for file in found:
            outcome = read_run(file)
            (runs if isinstance(outcome, Run) else problems)[file.resolve()] = outcome
    return sorted(runs.values(), key=lambda run: str(run.path)), sorted(problems.values(), key=lambda p: str(p.path))


def read_run(file: Path) -> Run | Problem:
    """The run that a summary file describes; the file need not exist where a run has only begun."""
    folder = file.parent if file.name == "summary.json" else file
    if not file.exists():
        return Problem(folder, "unfinished", _position(folder))
    try:
        summary = json.loads(file.read_text())
        fault = "not a JSON object" if not isinstance(summary, dict) else _fault(summary)
    except (OSError, ValueError, RecursionError) as error:
        fault = " ".join(str(error).split()) or type(error).__name__
    if fault:
        return Problem(folder, "damaged", f"{file.name}: {fault}")
    if not summary["finished"]:
        return Problem(folder, "unfinished", _position(folder))
    return Run(folder, summary)


def _position(folder: Path) -> str:
    """How far an unfinished run has come, from its epochs.jsonl."""
    try:
        last = json.loads((folder / "epochs.jsonl").read_text().splitlines()[-1])
        n_tasks = json.loads((folder / "config.json").read_text())["hyperparameters"]["n_tasks"]
        return f"saved at task {last['task'] + 1}/{n_tasks}, epoch {last['epoch']}; the same command continues it"
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return "no summary.json; the same command continues it"


def _fault(summary: dict[str, Any]) -> str:
    """What keeps a summary from being used; empty if nothing does."""

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    def matrix(value: Any) -> bool:
        return (
            isinstance(value, list)
            and bool(value)
            and all(isinstance(row, list) and all(x is None or number(x) for x in row) for row in value)
        )

    data, seconds = summary.get("data"), summary.get("seconds")
    notes = data.get("notes", []) if isinstance(data, dict) else None
    checks = {
        **{key: isinstance(summary.get(key), str) for key in ("benchmark", "method", "variant", "device")},
        "seed": isinstance(summary.get("seed"), int),
        "finished": isinstance(summary.get("finished"), bool),
        "data": isinstance(notes, list) and isinstance(data.get("kind"), str) and all(type(n) is str for n in notes),
        "average_accuracy": number(summary.get("average_accuracy")),
        "backward_transfer": summary.get("backward_transfer") is None or number(summary["backward_transfer"]),
        "accuracy": matrix(summary.get("accuracy")),
        "seconds": isinstance(seconds, dict) and number(seconds.get("total")),
    }
    wrong = [key for key, fine in checks.items() if not fine]
    return f"{', '.join(wrong)} missing or of a wrong kind" if wrong else ""


# ---- summing up


def summarise(runs: Sequence[Run]) -> list[Row]:
    """One row for each benchmark, data, variant and method, in the order of a paper's table."""
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        summary = run.summary
        key = (summary["benchmark"], summary["data"]["kind"], summary["variant"], summary["method"])
        groups.setdefault((*key, tuple(summary["data"].get("notes", ()))), []).append(run)

    def order(key: tuple) -> tuple:
        benchmark, data, variant, method, notes = key
        place = [list(names).index(name) if name in names else 99 for names, name in _named(benchmark, method)]
        return place[0], benchmark, data != "real", variant != "default", variant, place[1], method, notes

    return [_row(key, groups[key]) for key in sorted(groups, key=order)]


def _named(benchmark: str, method: str) -> tuple:
    return (BENCHMARKS, benchmark), (METHODS, method)


def _row(key: tuple, found: list[Run]) -> Row:
    benchmark, data, variant, method, notes = key
    by_seed: dict[int, Run] = {}
    remarks = list(notes)
    for run in found:
        first = by_seed.setdefault(run.summary["seed"], run)
        if first is not run and first.summary["accuracy"] != run.summary["accuracy"]:
            remarks.append(f"seed {run.summary['seed']} is there twice with different numbers; left out: {run.path}")
    runs = list(by_seed.values())
    transfers = [run.summary["backward_transfer"] for run in runs]
    row = Row(
        benchmark=benchmark,
        data=data,
        variant=variant,
        method=method,
        runs=runs,
        accuracy=estimate([run.summary["average_accuracy"] for run in runs]),
        backward_transfer=None if None in transfers else estimate(transfers),
        seconds=statistics.fmean(run.summary["seconds"]["total"] for run in runs),
        hardware="; ".join(dict.fromkeys(tidy_hardware(run.summary["device"]) for run in runs)),
        published=PUBLISHED.get((benchmark, method)) if data == "real" else None,
        notes=remarks,
    )
    # A protocol's notes say what the variant says already; any other tells of images that are not the published ones.
    complete = all(note.startswith("protocol ") for note in notes)
    row.verdict = verdict(row, complete, same_images=_same_images(runs))
    if row.published and row.published.doubt:
        row.notes.append(row.published.doubt)
    row.notes += [f"{name}: nothing here tells whether these are the published images" for name in _unverified(row)]
    if not _same_images(runs):
        row.notes.append("the runs of this row used different images (their checksums differ)")
    return row


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and sample standard deviation (over n - 1)."""
    return Estimate(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _same_images(runs: Sequence[Run]) -> bool:
    def checksums(run: Run) -> str:
        sources = run.summary["data"].get("sources") or {}
        return json.dumps(
            {name: [source.get("train_sha256"), source.get("test_sha256")] for name, source in sources.items()},
            sort_keys=True,
        )

    return len({checksums(run) for run in runs}) == 1


def _unverified(row: Row) -> list[str]:
    """Real data sets whose checksum is not a known one, but for those that a note mentions already."""
    if row.data != "real":
        return []
    sources = [run.summary["data"].get("sources") or {} for run in row.runs]
    names = {name: None for found in sources for name, source in found.items() if source.get("verified") is False}
    return [name for name in names if not any(note.startswith(f"{name}:") for note in row.notes)]


def verdict(row: Row, complete: bool, same_images: bool) -> str:
    """Whether the paper's row is reproduced, or why that cannot be said.

    Args:
        row: with its means and the published row.
        complete: the benchmark ran on the complete published data sets.
        same_images: all seeds did so on the same images.
    """
    if row.data != "real":
        return f"{row.data} data"
    if row.published is None:
        return "nothing published"
    if row.variant not in row.published.variants:
        return "not comparable: variant"
    if not complete:
        return "not comparable: data, see note"
    if not same_images:
        return "not comparable: images differ"
    missed = [] if reproduced(row.accuracy, row.published.accuracy) else ["ACC"]
    if row.backward_transfer and row.published.backward_transfer:
        missed += [] if reproduced(row.backward_transfer, row.published.backward_transfer) else ["BWT"]
    answer = f"no ({' and '.join(missed)})" if missed else "yes"
    return f"{answer}, paper's figure unverified" if row.published.doubt else answer


def tidy_hardware(device: str) -> str:
    """A device's description without trademark signs."""
    device = device.replace("(R)", "").replace("(TM)", "").replace(", 1 thread(s)", ", 1 thread")
    return " ".join(device.replace("thread(s)", "threads").split())


# ---- writing


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
    """The command that makes a row's runs."""
    hyperparameters = row.runs[0].summary.get("hyperparameters", {})
    flags = [f"--method {row.method}"]
    flags += [] if row.data == "real" else [f"--data {row.data}"]
    shortened = "~" in row.variant
    for part in [] if row.variant == "default" else row.variant.split(","):
        name = part.partition("=")[0]
        if name in hyperparameters:
            flags.append(_flag(name, hyperparameters[name]))
    flags += ["…"] if shortened else []
    seeds = row.seeds
    if len(seeds) == 1:
        return " ".join([f"python main_{row.benchmark}.py", *flags, f"--seed {seeds[0]}"])
    many = f"--only {row.benchmark} --methods {row.method} --seeds {' '.join(map(str, seeds))}"
    return " ".join(["bash run_experiments.sh paper", many, *flags[1:]])


def _flag(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    if isinstance(value, dict):
        value = [f"{key}={count}" for key, count in value.items()]
    return f"--{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"


def cells(row: Row, marks: str) -> dict[str, str]:
    """A row for people, by column heading."""
    paper = row.published
    return {
        "benchmark": BENCHMARKS.get(row.benchmark, row.benchmark) + marks,
        "data": row.data,
        "variant": row.variant,
        "method": METHODS.get(row.method, row.method),
        "ACC %": spread(row.accuracy, ".2f"),
        "BWT": spread(row.backward_transfer, "+.2f"),
        "paper ACC": spread(paper.accuracy, ".2f") if paper else NOTHING,
        "paper BWT": spread(paper.backward_transfer, "g") if paper else NOTHING,
        "reproduced": row.verdict,
        "seeds": str(len(row.runs)),
        "time a run": duration(row.seconds),
        "hardware": row.hardware,
    }


def table(rows: Sequence[Row]) -> tuple[list[dict[str, str]], list[str]]:
    """Rows of cells, and the lines that belong under them. What is the same in every row is said once, below."""
    numbered = list(dict.fromkeys(note for row in rows for note in row.notes))
    body = []
    for row in rows:
        marks = "".join(f" [{numbered.index(note) + 1}]" for note in dict.fromkeys(row.notes))
        body.append(cells(row, marks))
    notes = [f"[{i}] {note}" for i, note in enumerate(numbered, 1)]
    compared = any(row.published for row in rows)
    dropped = [] if compared else ["paper ACC", "paper BWT", "reproduced"]
    for heading in ("data", "hardware"):
        if len({line[heading] for line in body}) == 1:
            notes.append(f"{heading.capitalize()}: {body[0][heading]}.")
            dropped.append(heading)
    body = [{heading: cell for heading, cell in line.items() if heading not in dropped} for line in body]
    if any(row.data == "embedded" for row in rows):
        notes.append("Embedded data are rendered glyphs, not the published images: no number on them is a paper's.")
    if compared:
        notes.append("Reproduced: |ours - paper| <= max(1, 2 sqrt(s1^2/n1 + s2^2/n2)) points, in ACC and in BWT.")
    return body, notes


def as_text(rows: Sequence[Row], problems: Sequence[Problem]) -> str:
    """Aligned columns."""
    body, notes = table(rows)
    lines = []
    if body:
        headings = list(body[0])
        width = {h: max(len(h), *(len(line[h]) for line in body)) for h in headings}
        right = {"ACC %", "BWT", "paper ACC", "paper BWT", "seeds", "time a run"}

        def joined(line: dict[str, str]) -> str:
            return "  ".join(line[h].rjust(width[h]) if h in right else line[h].ljust(width[h]) for h in headings)

        lines = [joined({h: h for h in headings}), "  ".join("-" * width[h] for h in headings), *map(joined, body)]
    return _paragraphs([line.rstrip() for line in lines], notes, _problem_lines(problems))


def as_markdown(rows: Sequence[Row], problems: Sequence[Problem]) -> str:
    """A table with the command of each row."""
    body, notes = table(rows)
    for row, line in zip(rows, body, strict=True):
        line["command"] = f"`{command(row)}`"
    lines = []
    if body:
        headings = list(body[0])
        lines = [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
        lines += [f"| {' | '.join(cell.replace('|', '/') for cell in line.values())} |" for line in body]
        # Notes mention |ours - paper| and [1]: neither means anything to Markdown outside a table.
    return _paragraphs(lines, [f"{note}  " for note in notes], [f"- {line}" for line in _problem_lines(problems)])


def as_latex(rows: Sequence[Row], problems: Sequence[Problem]) -> str:
    """A tabular for the booktabs package; what is listed below the table is a comment."""
    body, notes = table(rows)
    lines = []
    if body:
        headings = list(body[0])
        lines = [f"\\begin{{tabular}}{{{'l' * len(headings)}}}", "\\toprule"]
        lines += [" & ".join(map(_latex, headings)) + r" \\", "\\midrule"]
        lines += [" & ".join(map(_latex, line.values())) + r" \\" for line in body]
        lines += ["\\bottomrule", "\\end{tabular}"]
    below = [f"% {line}" for line in (*notes, *_problem_lines(problems))]
    return _paragraphs(lines, below, [])


def _latex(text: str) -> str:
    special = {c: f"\\{c}" for c in "&%$#_{}"}
    special |= {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {"±": r"$\pm$", "–": "--", "…": r"\ldots{}"}
    text = "".join(special.get(c, c) for c in text)
    return f"${text[0]}$" + text[1:] if text[:1] in ("-", "+") and text[1:2].isdigit() else text


def as_csv(rows: Sequence[Row], problems: Sequence[Problem]) -> str:
    """Every number, unrounded; unfinished and damaged runs are rows without numbers."""

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
            | {"n": len(row.runs), "seeds": " ".join(map(str, row.seeds)), "seconds": row.seconds}
            | {"hardware": row.hardware}
            | numbers(row.published and row.published.accuracy, "paper_average_accuracy")
            | numbers(row.published and row.published.backward_transfer, "paper_backward_transfer")
            | {"reproduced": row.verdict, "notes": "; ".join(row.notes), "command": command(row), "path": ""}
        )
    headings = list(lines[0]) if lines else ["status", "notes", "path"]
    lines += [{"status": p.status, "notes": p.reason, "path": str(p.path)} for p in problems]
    text = io.StringIO()
    writer = csv.DictWriter(text, headings, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _problem_lines(problems: Sequence[Problem]) -> list[str]:
    return [f"{problem.status}: {problem.path} ({problem.reason})" for problem in problems]


def _paragraphs(*parts: Sequence[str]) -> str:
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


FORMATS = {"text": as_text, "markdown": as_markdown, "latex": as_latex, "csv": as_csv}


# ---- pictures, copies, README


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Pictures, PNG and PDF: methods compared on each benchmark, data and variant; matrix and memory of each row.

    Returns:
        the files written.
    """
    from gpm import plots  # Matplotlib takes a second to import, which a table need not wait for

    written: list[Path] = []

    def save(figure: Any, name: str) -> None:
        for suffix in ("png", "pdf"):
            written.append(folder / f"{name}.{suffix}")
            plots.save(figure, written[-1])

    comparisons: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        comparisons.setdefault((row.benchmark, row.data, row.variant), []).append(row)
    for (benchmark, data, variant), members in comparisons.items():
        title = f"{BENCHMARKS.get(benchmark, benchmark)} ({data} data)"
        title += "" if variant == "default" else f"\n{variant}"
        stem = _file_name(f"{data}-{benchmark}-{variant}")
        # Rows that differ in their notes alone would hide each other: the one with the most runs stands for all.
        best = {row.method: row for row in sorted(members, key=lambda row: len(row.runs))}
        shown = {row.method: row for row in members if best[row.method] is row}
        matrices = {name: [run.summary["accuracy"] for run in row.runs] for name, row in shown.items()}
        save(plots.accuracy_over_time(matrices, title), f"{stem}-accuracy_over_time")
        scores = {name: (row.accuracy, row.backward_transfer) for name, row in shown.items()}
        save(plots.method_bars(scores, title), f"{stem}-methods")
        for name, row in shown.items():
            seeds = f"mean of {len(row.runs)} seeds" if len(row.runs) > 1 else f"seed {row.seeds[0]}"
            heading = f"{title.replace(' data)', f' data), {METHODS.get(name, name)}, {seeds}', 1)}"
            save(plots.accuracy_heat_map(plots.mean_matrix(matrices[name]), heading), f"{stem}-{name}-accuracy")
            columns = plots.mean_columns([run.summary.get("memory_columns") or {} for run in row.runs])
            if columns:
                sizes = row.runs[0].summary["memory_input_sizes"]
                save(plots.memory_growth(columns, sizes, heading), f"{stem}-{name}-memory")
    return written


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in text)


def collect(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Copy summaries to FOLDER/DATA/BENCHMARK/METHOD/VARIANT/seed-N.json, without the paths of this machine."""
    written = []
    for run in runs:
        summary = dict(run.summary)
        options = summary.get("hyperparameters", {})
        summary["hyperparameters"] = {name: value for name, value in options.items() if name not in LOCAL_ONLY}
        parts = (summary["data"]["kind"], summary["benchmark"], summary["method"], summary["variant"])
        path = folder.joinpath(*map(_file_name_part, parts), f"seed-{summary['seed']}.json")
        write_json(path, summary)
        written.append(path)
    return written


def _file_name_part(text: str) -> str:
    return text.replace("/", "_").lstrip(".") or "_"


def block(rows: Sequence[Row], problems: Sequence[Problem]) -> str:
    """What stands in a README between the markers, the markers included."""
    return f"{BEGIN}\n{as_markdown(rows, problems)}{END}"


def split_readme(text: str) -> tuple[str, str, str] | None:
    """A README before, at and after its block of results; None if it has no such markers."""
    head, begin, rest = text.partition(BEGIN)
    middle, end, tail = rest.partition(END)
    return (head, begin + middle + end, tail) if begin and end else None


def update_readme(path: Path, rows: Sequence[Row], problems: Sequence[Problem]) -> None:
    """Replace the block of results of a README.

    Raises:
        InputError: it cannot be read or written, or has no markers.
    """
    try:
        parts = split_readme(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if parts is None:
        raise InputError(f"{path} has no lines {BEGIN} and {END} to put the table between")
    write_text(path, parts[0] + block(rows, problems) + parts[2])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = Parser(prog="python -m gpm.report", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="run folders, or folders that hold them at any depth")
    parser.add_argument("--format", choices=tuple(FORMATS), default="text", help="of the table (default: text)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the pictures into this folder")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="copy the finished summaries into this folder")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table between this file's markers")
    args = parser.parse_args(argv)
    try:
        runs, problems = find_runs(args.paths)
        rows = summarise(runs)
        print(FORMATS[args.format](rows, problems), end="")
        said = []
        if args.plots:
            said += draw(rows, args.plots)
        if args.collect:
            said += collect(runs, args.collect)
        if args.readme:
            update_readme(args.readme, rows, problems)
            said.append(args.readme)
        for path in said:
            print(f"wrote {path}", file=sys.stderr)
    except InputError as error:
        print(f"gpm.report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
