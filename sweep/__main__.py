"""Many runs from one command: methods x benchmarks x seeds, several at a time, continued when repeated.

bash run_experiments.sh                                   # everything on embedded data: minutes, no download
bash run_experiments.sh paper                             # the paper's protocol on the real data
bash run_experiments.sh paper --seeds 1 2 3 4 5 --only cifar100 pmnist --jobs 2
bash run_experiments.sh paper --table 1 --jobs 4          # every method of the paper's Table 1, seeds 1 to 5
bash run_experiments.sh paper --only pmnist --sweep threshold=0.9,0.95,0.99    # GPM at each of these values
bash run_experiments.sh paper --table 1 --ray auto        # on all machines of a Ray cluster
bash run_experiments.sh paper --n_epochs 20 --device cpu  # flags not listed below go to every script

A run that is finished is not run again; one that was stopped goes on from its checkpoint. What each run prints is kept
in OUTPUT_DIR/logs. Ctrl-C stops all runs. Real data are downloaded into data/, unless they are there already.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import itertools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from engine import cli
from engine.cli import Parser
from gradproj.errors import InputError
from methods import METHODS
from report import rows as comparison
from report import runs as summaries
from report import tables
from report.plots import draw as figures
from sweep.cluster import Cluster
from sweep.jobs import Job, Outcome, available_cores, run_jobs, terminable, usual_jobs, wanted_threads

ROOT = Path(__file__).resolve().parent.parent  # where the scripts are

# What `run_experiments.sh` alone runs: sizes at which GPM stands out within minutes on two CPU cores. Longest first.
EMBEDDED = {
    "five_datasets": "--n_train 60 --n_epochs 8",
    "cifar100": "--n_tasks 5 --n_epochs 8 --lr 0.03 --threshold 0.9",  # noise would fill the memory at the paper's 0.97
    "cifar100_superclass": "--n_tasks 6 --n_epochs 10",
    "pmnist": "--n_tasks 5 --n_epochs 5",
}
EMBEDDED_METHODS = ("gpm", "naive")

# What `run_experiments.sh paper` runs, with every script's own defaults: the paper's.
PAPER = dict.fromkeys(("pmnist", "cifar100", "cifar100_superclass", "five_datasets"), ("gpm", "naive"))
# `--table N`: the paper's tables.
TABLES = {
    1: {
        "cifar100": ("multitask", "owm", "ewc", "hat", "a_gem", "er", "gpm"),
        "five_datasets": ("multitask", "ewc", "hat", "a_gem", "er", "gpm"),
        "pmnist": ("multitask", "ogd", "owm", "ewc", "a_gem", "er", "gpm"),
    },
    2: {"cifar100_superclass": ("single", "gpm")},
}
TABLE_SEEDS = (1, 2, 3, 4, 5)


def misfit(benchmark: str, method: str) -> str | None:
    """Why a method cannot run on a benchmark; None if it can."""
    if benchmark == "pmnist":
        return "needs a head for each task" if method == "hat" else None
    return "is for a single head and Linear layers" if method == "ogd" else None


def make_jobs(args: argparse.Namespace, passed_on: Sequence[str]) -> list[Job]:
    """The jobs that a command line asks for, in the order to start them.

    Raises:
        InputError, SystemExit: a script does not take its flags.
    """
    embedded = args.what == "embedded"
    if embedded:
        plan = dict.fromkeys(EMBEDDED, EMBEDDED_METHODS)
    else:
        plan = TABLES[args.table] if args.table else PAPER
    if args.only:
        # A benchmark outside the chosen table is run with what is always run.
        plan = {name: plan.get(name, PAPER[name]) for name in args.only}
    if args.methods:
        plan = dict.fromkeys(plan, tuple(args.methods))
    elif args.sweep:
        plan = dict.fromkeys(plan, ("gpm",))
    for name, methods in plan.items():
        for method in methods:
            if reason := misfit(name, method):
                print(f"left out: {name} {method}, which {reason}")
    plan = {name: [method for method in methods if not misfit(name, method)] for name, methods in plan.items()}
    seeds = args.seeds or (TABLE_SEEDS if args.table else (None,))  # None: the script's own
    values = args.sweep[1] if args.sweep else (None,)
    jobs = []
    for seed in seeds:
        for benchmark, methods in plan.items():
            for method, value in itertools.product(methods, values):
                flags = ["--data", "embedded", *shlex.split(EMBEDDED[benchmark])] if embedded else []
                flags += ["--method", method, "--output_dir", str(args.output_dir), *passed_on]
                flags += [] if seed is None else ["--seed", str(seed)]
                flags += [] if value is None else [f"--{args.sweep[0]}", *value.split()]
                name = f"{benchmark} {method}" + ("" if seed is None else f" seed {seed}")
                name += "" if value is None else f" {args.sweep[0]} {value}"
                check_flags(benchmark, flags)
                jobs.append(make_job(name, benchmark, flags, args.output_dir))
    return jobs


def check_flags(benchmark: str, flags: Sequence[str]) -> None:
    """Let a script's own parser look at a command, so that a mistyped flag is said once and before anything runs."""
    module = importlib.import_module(f"main_{benchmark}")
    cli.parse(module.Hyperparameters, flags, None, prog=f"main_{benchmark}.py")


def make_job(name: str, benchmark: str, flags: Sequence[str], output_dir: Path) -> Job:
    """One script's run; its log is named by all that decides the command."""
    command = (sys.executable, "-u", str(ROOT / f"main_{benchmark}.py"), *flags)
    digest = hashlib.sha256(shlex.join(flags).encode()).hexdigest()[:8]
    return Job(name, command, output_dir / "logs" / f"{name.replace(' ', '-')}-{digest}.log")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own arguments, and those for the scripts."""
    parser = Parser(
        prog="run_experiments.sh",
        usage="bash run_experiments.sh [embedded | paper] [FLAGS]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # --seed is a script's flag, not short for --seeds
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
    add("--table", type=int, choices=tuple(TABLES), help="with paper: all methods of a table of the paper, seeds 1-5")
    add(
        "--jobs",
        type=int,
        metavar="N",
        help="runs side by side (default: as many as cores and memory hold; 1 where there is a GPU)",
    )
    add(
        "--sweep",
        type=sweep_of,
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
    # Not an argparse positional: those swallow the values of flags that are passed on.
    arguments = list(sys.argv[1:] if argv is None else argv)
    what = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "embedded"
    if what not in ("embedded", "paper"):
        parser.error(f"{what!r} is not known; it must be embedded or paper")
    args, passed_on = parser.parse_known_args(arguments)
    args.what = what
    if passed_on and not passed_on[0].startswith("--"):
        parser.error(f"{passed_on[0]!r} is not a flag")
    if args.table and args.what != "paper":
        parser.error("--table goes with paper: run_experiments.sh paper --table 1")
    if args.gpus_per_run is not None and (not args.ray or not args.gpus_per_run >= 0):
        parser.error(f"--gpus_per_run is {args.gpus_per_run:g}; it goes with --ray and must not be negative")
    given = {argument.partition("=")[0].removeprefix("--") for argument in passed_on if argument.startswith("--")}
    swept = args.sweep[0] if args.sweep else None
    if swept in given:
        parser.error(f"--{swept} is given and swept; give one")
    if {swept, *given} & {"seed", "method", "seeds", "methods"}:
        parser.error("use --seeds and --methods here, each with one or more values")
    if {swept, *given} & {"run_folder", "config"}:
        parser.error("--run_folder and --config are of a single run: give them to its script")
    if args.what == "embedded" and "data" in given:
        parser.error("--data is what the first word says: embedded, or paper")
    if args.jobs is not None and args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; it must be positive")
    if args.figures and args.figures.exists() and not args.figures.is_dir():
        parser.error(f"--figures {args.figures} is a file; it must be a folder")
    if args.seeds and len(set(args.seeds)) < len(args.seeds):
        parser.error(f"--seeds {' '.join(map(str, args.seeds))}: each once")
    return args, passed_on


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
    runs, problems = summaries.find_runs(outcome.folders)
    rows = comparison.summarise(runs)
    print(f"\n{tables.as_text(rows, problems, validation=bool(against))}")
    if against and len(rows) < 2:
        against = None  # the other values failed
    pictures = [path for path in figures.draw(rows, folder, against) if path.suffix == ".png"]
    pictures += sorted(path for run in runs for path in run.path.glob("*.png"))
    print(f"Pictures (those in {folder} as PDF too):")
    print("\n".join(f"  {path}" for path in pictures))


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sweep; returns the exit code: 1 if a run failed, 2 for bad input, 130 when interrupted."""
    try:
        args, passed_on = parse(argv)
        jobs = make_jobs(args, passed_on)
        if not jobs:
            raise InputError("that leaves nothing to run; choose other --methods or benchmarks (--only)")
        n_at_once = args.jobs or usual_jobs(len(jobs))
        threads = wanted_threads() or max(1, available_cores() // n_at_once)
        cluster = None
        if args.ray:
            threads = wanted_threads() or 1
            cluster = Cluster(args.ray, ROOT, threads, args.gpus_per_run)
            n_at_once = args.jobs or cluster.n_at_once
        print(f"{len(jobs)} runs, {n_at_once} at a time, {threads} CPU thread(s) each")
        try:
            with terminable():
                outcome = run_jobs(jobs, n_at_once, threads, cluster)
        finally:
            if cluster:
                cluster.close()
        finish(outcome, args.figures or args.output_dir / "figures", args.sweep and args.sweep[0])
    except InputError as error:
        print(f"run_experiments.sh: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    for job in outcome.failed:
        print(f"failed: {job.name}, see {job.log}", file=sys.stderr)
    return 1 if outcome.failed else 0


if __name__ == "__main__":
    sys.exit(main())
