"""One table from any set of run folders: mean ± std over seeds, beside what the paper reports.

python -m report runs                                  # every run under runs/, as text
python -m report runs/real --format latex              # or markdown, csv
python -m report runs --plots figures                  # PNG and PDF of every comparison
python -m report runs --plots figures --against threshold   # and of ACC, BWT and interference over a sweep
python -m report runs --html report.html               # all of it in one file to send: tables, pictures, matrices
python -m report runs/real --collect results           # copy finished summaries into results/
python -m report results/real --readme README.md --page docs/results.md     # rewrite these pages' tables from them
python -m report results/real --successors docs/successors.md               # and those of the methods after GPM
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.cli import Parser, exit_code
from engine.files import write_json
from gradproj.errors import InputError
from report.pages import PAGES, update_page
from report.rows import summarise
from report.runs import LOCAL_ONLY, Run, find_runs
from report.tables import FORMATS


def collect(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Copy summaries to FOLDER/DATA/BENCHMARK/METHOD/VARIANT/seed-N.json, without the paths of this machine."""
    places: dict[Path, Run] = {}
    for run in runs:
        parts = (run.summary["data"]["kind"], *(run.summary[name] for name in ("benchmark", "method", "variant")))
        path = folder.joinpath(*map(_file_name_part, parts), f"seed-{run.summary['seed']}.json")
        if other := places.get(path):
            raise InputError(f"{other.path} and {run.path} would both be {path}: collect one of them")
        places[path] = run
    for path, run in places.items():
        summary = {name: value for name, value in run.summary.items() if name != "folder"}
        options = summary.get("hyperparameters", {})
        summary["hyperparameters"] = {name: value for name, value in options.items() if name not in LOCAL_ONLY}
        write_json(path, summary)
    return list(places)


def _file_name_part(text: str) -> str:
    return text.replace("/", "_").lstrip(".") or "_"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code: 1 where a path has no run, or only damaged ones, 2 for bad input."""
    return exit_code("report", lambda: report(make_parser().parse_args(argv)))


def make_parser() -> Parser:
    parser = Parser(prog="python -m report", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="run folders, or folders that hold them at any depth")
    parser.add_argument("--format", choices=tuple(FORMATS), default="text", help="of the table (default: text)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the pictures into this folder")
    parser.add_argument(
        "--against", metavar="NAME", help="show the validation accuracy; with --plots, ACC and BWT over it too"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write one HTML file that holds everything")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="copy the finished summaries into this folder")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE", help="put the table of the main rows between this file's markers"
    )
    parser.add_argument(
        "--page", type=Path, metavar="FILE", help="put the tables of all rows between this file's markers"
    )
    parser.add_argument(
        "--successors", type=Path, metavar="FILE", help="put GPM's successors beside it between this file's markers"
    )
    return parser


def report(args: argparse.Namespace) -> int:
    """Print the table and write what else is asked for; returns the exit code."""
    runs, problems = find_runs(args.paths)
    rows = summarise(runs)
    if args.against and not any(args.against in run.summary.get("hyperparameters", {}) for run in runs):
        raise InputError(f"--against {args.against}: none of these runs has such a hyperparameter")
    if args.against and (args.plots or args.html):
        from report.plots.draw import sweeps

        if not sweeps(rows, args.against):
            what = f"no two of these runs differ in {args.against} alone"
            raise InputError(f"{what}, so nothing can be drawn over it")
    if args.html and args.html.is_dir():
        raise InputError(f"--html {args.html} is a folder; give a file such as {args.html / 'report.html'}")
    print(FORMATS[args.format](rows, problems, validation=bool(args.against) or args.format == "csv"), end="")
    written = []
    if args.plots:
        from report.plots.draw import draw  # Matplotlib takes a second to import, which a table need not wait for

        written += draw(rows, args.plots, args.against)
    if args.html:
        from report.html import write_report

        write_report(args.html, rows, problems, args.against)
        written.append(args.html)
    if args.collect:
        written += collect([run for row in rows for run in row.runs], args.collect)
    for name in PAGES:
        if path := getattr(args, name):
            update_page(path, name, rows, problems)
            written.append(path)
    for path in written:
        print(f"wrote {path}", file=sys.stderr)
    statuses = {problem.status for problem in problems}
    return int("missing" in statuses or ("damaged" in statuses and not runs))


if __name__ == "__main__":
    sys.exit(main())
