"""One table from any set of run folders: mean ± std over seeds, beside what the paper reports.

python -m report runs                                  # every run under runs/, as text
python -m report runs/real --format latex              # or markdown, csv
python -m report runs --plots figures                  # PNG and PDF of every comparison
python -m report runs --plots figures --against threshold   # and of ACC, BWT and interference over a sweep
python -m report runs/real --collect results           # copy finished summaries into results/
python -m report results/real --readme README.md       # rewrite the README's table from them
"""

from __future__ import annotations

import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path

from engine.cli import Parser
from engine.files import write_json, write_text
from gradproj.errors import InputError
from report.rows import Row, summarise
from report.runs import Problem, Run, find_runs
from report.tables import FORMATS, as_markdown

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
LOCAL_ONLY = ("data_dir", "output_dir", "quiet")  # paths and taste of one machine, left out of collected summaries


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
    parser = Parser(prog="python -m report", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path, help="run folders, or folders that hold them at any depth")
    parser.add_argument("--format", choices=tuple(FORMATS), default="text", help="of the table (default: text)")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw the pictures into this folder")
    parser.add_argument(
        "--against", metavar="NAME", help="show the validation accuracy; with --plots, ACC and BWT over it too"
    )
    parser.add_argument("--collect", type=Path, metavar="DIR", help="copy the finished summaries into this folder")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="put the table between this file's markers")
    args = parser.parse_args(argv)
    try:
        runs, problems = find_runs(args.paths)
        rows = summarise(runs)
        print(FORMATS[args.format](rows, problems, validation=bool(args.against) or args.format == "csv"), end="")
        said = []
        if args.plots:
            from report.plots.draw import draw  # Matplotlib takes a second to import, which a table need not wait for

            said += draw(rows, args.plots, args.against)
        if args.collect:
            said += collect(runs, args.collect)
        if args.readme:
            update_readme(args.readme, rows, problems)
            said.append(args.readme)
        for path in said:
            print(f"wrote {path}", file=sys.stderr)
    except InputError as error:
        print(f"report: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
