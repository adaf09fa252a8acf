"""Many runs from one command: methods x benchmarks x seeds, several at a time, continued when repeated.

bash run_experiments.sh                                   # everything on embedded data: minutes, no download
bash run_experiments.sh paper                             # the paper's protocol on the real data
bash run_experiments.sh paper --seeds 1 2 3 4 5 --only cifar100 pmnist --jobs 2
bash run_experiments.sh paper --table 1 --jobs 4          # every method of the paper's Table 1, seeds 1 to 5
bash run_experiments.sh paper --table successors          # GPM and the methods that came after it, seeds 1 to 5
bash run_experiments.sh paper --only pmnist --sweep threshold=0.9,0.95,0.99    # GPM at each of these values
bash run_experiments.sh paper --table 1 --ray auto        # on all machines of a Ray cluster
bash run_experiments.sh paper --n_epochs 20 --device cpu  # flags not listed below go to every script

A run that is finished is not run again; one that was stopped goes on from its checkpoint. What each run prints is kept
in OUTPUT_DIR/logs. Ctrl-C stops all runs. Real data are downloaded into data/, unless they are there already.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.cli import Parser, exit_code
from methods import METHODS
from report import tables
from report.plots import draw as figures
from report.rows import summarise
from report.runs import find_runs
from sweep.cluster import Cluster
from sweep.jobs import Outcome, run_jobs, terminable
from sweep.machine import available_cores, default_jobs, wanted_threads
from sweep.plan import PAPER, ROOT, TABLES, Wanted, flag_name, make_jobs, split_flags


def make_parser() -> Parser:
    """The sweep's own flags; all others are for the scripts."""
    parser = Parser(
        prog="run_experiments.sh",
        usage="bash run_experiments.sh [embedded | paper] [FLAGS]",
        description=__doc__,
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=tuple(PAPER), metavar="BENCHMARK", help=f"some of: {', '.join(PAPER)}")
    add(
        "--methods",
        nargs="+",
        choices=tuple(METHODS),
        metavar="METHOD",
        help=f"instead of gpm and naive: {', '.join(METHODS)}",
    )
    add("--seeds", nargs="+", type=int, metavar="SEED", help="default: each script's own, the released code's")
    add(
        "--table",
        choices=tuple(TABLES),
        help="with paper: all methods of the paper's Table 1 or 2, or GPM and those that came after it; seeds 1-5",
    )
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="runs side by side (default: as many as cores and memory hold)",
    )
    add(
        "--sweep",
        type=sweep_of,
        action="append",
        metavar="NAME=VALUE,…",
        help="run gpm (or --methods) at each value of a hyperparameter and draw ACC, BWT and interference over it; "
        "one value for each layer is written with spaces: threshold='0.9 0.95 0.95,0.95 0.99 0.99'",
    )
    add("--figures", type=Path, metavar="DIR", help="folder for the pictures (default: OUTPUT_DIR/figures)")
    add(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        help="run on the Ray cluster at this address (auto: the one this machine belongs to; local, or no address: one "
        "started here); every machine sees the same files. pip install -e '.[cluster]'",
    )
    add("--gpus_per_run", type=float, metavar="N", help="with --ray: GPUs of a run (default: 0.25 if it has any)")
    add("--output_dir", type=Path, default=Path("runs"), help="folder that gets everything (default: runs)")
    return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own arguments, and those for the scripts."""
    parser = make_parser()
    # Not an argparse positional: those swallow the values of flags that are passed on.
    arguments = list(sys.argv[1:] if argv is None else argv)
    what = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "embedded"
    if what not in ("embedded", "paper"):
        parser.error(f"{what!r} is not known; it must be embedded or paper")
    args, passed_on = parser.parse_known_args(arguments)
    args.what = what
    if args.sweep and len(args.sweep) > 1:
        parser.error("--sweep is given twice; it goes over one hyperparameter")
    args.sweep = args.sweep and args.sweep[0]
    if wrong := fault(args) or fault_of_flags(args, passed_on):
        parser.error(wrong)
    return args, passed_on


def wanted(args: argparse.Namespace, passed_on: Sequence[str]) -> Wanted:
    """What the arguments ask for."""
    return Wanted(
        embedded=args.what == "embedded",
        only=args.only,
        methods=args.methods,
        table=args.table,
        seeds=args.seeds,
        sweep=args.sweep,
        output_dir=args.output_dir,
        passed_on=passed_on,
    )


def fault(args: argparse.Namespace) -> str | None:
    """What is wrong with the sweep's own arguments."""
    if args.table and args.what != "paper":
        return "--table goes with paper: run_experiments.sh paper --table 1"
    if args.gpus_per_run is not None and (not args.ray or not args.gpus_per_run >= 0):
        return f"--gpus_per_run is {args.gpus_per_run:g}; it goes with --ray and must not be negative"
    if args.jobs is not None and args.jobs < 1:
        return f"--jobs is {args.jobs}; it must be positive"
    if args.figures and args.figures.exists() and not args.figures.is_dir():
        return f"--figures {args.figures} is a file; it must be a folder"
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        return f"--seeds {' '.join(map(str, args.seeds))}: each once"
    return None


def fault_of_flags(args: argparse.Namespace, passed_on: Sequence[str]) -> str | None:
    """What is wrong with the flags for the scripts, or with a hyperparameter to sweep."""
    if passed_on and not passed_on[0].startswith("--"):
        return f"{passed_on[0]!r} is not a flag"
    given, swept = set(map(flag_name, split_flags(passed_on))), args.sweep[0] if args.sweep else None
    if swept in given:
        return f"--{swept} is given and swept; give one"
    if {swept, *given} & {"seed", "method", "seeds", "methods"}:
        return "use --seeds and --methods here, each with one or more values"
    if {swept, *given} & {"run_folder", "config"}:
        return "--run_folder and --config are of a single run: give them to its script"
    if args.what == "embedded" and "data" in given:
        return "--data is what the first word says: embedded, or paper"
    return None


def sweep_of(text: str) -> tuple[str, tuple[str, ...]]:
    """The value of --sweep: a hyperparameter and what it is to be."""
    name, equals, values = text.partition("=")
    parts = tuple(" ".join(value.split()) for value in values.split(","))
    if not equals or not name.isidentifier() or len(set(parts)) < max(2, len(parts)) or "" in parts:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE,VALUE,… with two or more different values")
    return name, parts


def finish(outcome: Outcome, folder: Path, against: str | None) -> None:
    """Print the table of the finished runs and draw the pictures."""
    if not outcome.folders:
        return
    runs, problems = find_runs(outcome.folders)
    rows = summarise(runs)
    print(f"\n{tables.as_text(rows, problems, validation=bool(against))}")
    pictures = [path for path in figures.draw(rows, folder, against) if path.suffix == ".png"]
    pictures += sorted(path for run in runs for path in run.path.glob("*.png"))
    print(f"Pictures (those in {folder} as PDF too):")
    print("\n".join(f"  {path}" for path in pictures))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep; returns the exit code: 1 if a run failed, 2 for bad input, 130 when interrupted."""
    try:
        return exit_code("run_experiments.sh", lambda: sweep(*parse(argv)))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130


def sweep(args: argparse.Namespace, passed_on: Sequence[str]) -> int:
    """Make all runs, then their table and pictures; returns the exit code."""
    jobs = make_jobs(wanted(args, passed_on))
    n_at_once = args.jobs or default_jobs(len(jobs))
    threads = wanted_threads() or max(1, available_cores() // n_at_once)
    cluster = None
    if args.ray:
        threads = wanted_threads() or 1
        cluster = Cluster(args.ray, ROOT, threads, args.gpus_per_run)
        n_at_once = args.jobs or cluster.n_at_once
    runs = "1 run" if len(jobs) == 1 else f"{len(jobs)} runs"
    print(f"{runs}, {n_at_once} at a time, {threads} CPU thread(s) each")
    try:
        with terminable():
            outcome = run_jobs(jobs, n_at_once, threads, cluster)
    finally:
        if cluster:
            cluster.close()
    finish(outcome, args.figures or args.output_dir / "figures", args.sweep and args.sweep[0])
    for job in outcome.failed:
        print(f"failed: {job.name}, see {job.log}", file=sys.stderr)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
