"""Which runs a sweep is made of: methods x benchmarks x seeds x values of a hyperparameter."""

from __future__ import annotations

import hashlib
import importlib
import itertools
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from engine import cli
from engine.folder import run_folder
from engine.method import Method, why_not
from engine.options import Options, results_options, told, unread
from gradproj.errors import InputError
from methods import METHODS
from report.published import ALWAYS, BENCHMARKS, SUCCESSORS
from sweep.jobs import Job

ROOT = Path(__file__).resolve().parent.parent  # where the scripts are
ONE_HEAD = ("pmnist",)  # benchmarks whose tasks share one head

# What `run_experiments.sh` alone runs: sizes at which GPM stands out within minutes on two CPU cores. Longest first.
EMBEDDED = {
    "five_datasets": "--n_train 60 --n_epochs 8",
    "miniimagenet": "--n_tasks 5 --n_epochs 8",
    "cifar100": "--n_tasks 5 --n_epochs 8 --lr 0.03 --threshold 0.9",  # noise would fill the memory at the paper's 0.97
    "cifar100_superclass": "--n_tasks 6 --n_epochs 10",
    "pmnist": "--n_tasks 5 --n_epochs 5",
}

# What `run_experiments.sh paper` runs, with every script's own defaults: the paper's.
PAPER = dict.fromkeys(BENCHMARKS, ALWAYS)
# `--table NAME`: the paper's tables, and GPM beside the methods that came after it.
TABLES = {
    "1": {
        "cifar100": ("multitask", "owm", "ewc", "hat", "a_gem", "er", "gpm"),
        "miniimagenet": ("multitask", "ewc", "hat", "a_gem", "er", "gpm"),
        "five_datasets": ("multitask", "ewc", "hat", "a_gem", "er", "gpm"),
        "pmnist": ("multitask", "ogd", "owm", "ewc", "a_gem", "er", "gpm"),
    },
    "2": {"cifar100_superclass": ("single", "gpm")},
    "successors": dict.fromkeys(PAPER, ("gpm", *SUCCESSORS)),
}
TABLE_SEEDS = (1, 2, 3, 4, 5)


class Wanted(NamedTuple):
    """What a command line asks for.

    Attributes:
        embedded: on embedded data, not by the paper's protocol.
        only: benchmarks; None for those of the plan.
        methods: None for those of the plan.
        table: a name in TABLES.
        seeds: None for each script's own.
        sweep: a hyperparameter and its values.
        output_dir: folder that gets everything.
        passed_on: flags for the scripts.
    """

    embedded: bool
    only: Sequence[str] | None
    methods: Sequence[str] | None
    table: str | None
    seeds: Sequence[int] | None
    sweep: tuple[str, tuple[str, ...]] | None
    output_dir: Path
    passed_on: Sequence[str]


def make_jobs(wanted: Wanted) -> list[Job]:
    """The jobs, in the order to start them; methods that do not fit a benchmark are left out with a line.

    Raises:
        InputError, SystemExit: a script does not take its flags, or two of the runs would be the same.
    """
    flags = list(split_flags(wanted.passed_on))
    plan = benchmarks_and_methods(wanted, flags)
    seeds = wanted.seeds or (TABLE_SEEDS if wanted.table else (None,))  # None: the script's own
    values = wanted.sweep[1] if wanted.sweep else (None,)
    check_readers([*flags, *([[f"--{wanted.sweep[0]}"]] if wanted.sweep else [])], plan)
    check_decisive(wanted.sweep, plan)
    jobs: dict[Path, Job] = {}
    for seed in seeds:
        for benchmark, methods in plan.items():
            for method, value in itertools.product(methods, values):
                swept = [] if value is None else [f"--{wanted.sweep[0]}", *value.split()]
                own = flags_for(benchmark, METHODS[method], wanted.embedded, flags)
                own += ["--method", method, "--output_dir", str(wanted.output_dir), *swept]
                own += [] if seed is None else ["--seed", str(seed)]
                name = f"{benchmark} {method}" + ("" if seed is None else f" seed {seed}")
                name += "" if value is None else f" {wanted.sweep[0]} {value}"
                job = make_job(name, benchmark, own, wanted.output_dir, wanted.sweep and wanted.sweep[0])
                if other := jobs.get(job.folder):
                    raise InputError(f"{other.name} and {job.name} are the same run; give it once")
                jobs[job.folder] = job
    if not jobs:
        raise InputError("that leaves nothing to run; choose other --methods or benchmarks (--only)")
    return list(jobs.values())


def benchmarks_and_methods(wanted: Wanted, flags: Sequence[Sequence[str]] = ()) -> dict[str, list[str]]:
    """The methods to run on each benchmark, those that fit it; without what nobody named and cannot run."""
    plan: Mapping[str, Sequence[str]] = TABLES[wanted.table] if wanted.table else PAPER
    if wanted.embedded:
        plan = dict.fromkeys(EMBEDDED, ALWAYS)
    if wanted.only:  # a benchmark outside the chosen table is run with what is always run
        plan = {name: plan.get(name, PAPER[name]) for name in wanted.only}
    if wanted.methods:
        plan = dict.fromkeys(plan, tuple(wanted.methods))
    elif wanted.sweep:
        plan = dict.fromkeys(plan, ("gpm",))
    fitting: dict[str, list[str]] = {}
    for benchmark, methods in plan.items():
        if not wanted.only and (reason := why_it_cannot_run(benchmark, wanted.embedded, flags)):
            print(f"left out: {benchmark}, {reason}")
            continue
        reasons = {method: why_not(METHODS[method], many_heads=benchmark not in ONE_HEAD) for method in methods}
        for method, reason in reasons.items():
            if reason:
                print(f"left out: {benchmark} {method}, which {reason}")
        fitting[benchmark] = [method for method, reason in reasons.items() if not reason]
    return fitting


def why_it_cannot_run(benchmark: str, embedded: bool, flags: Sequence[Sequence[str]]) -> str | None:
    """Why a benchmark cannot run on this machine or with these flags, of reasons that are nobody's fault."""
    given = {flag_name(flag): flag[0].partition("=")[2] or flag[-1] for flag in flags}
    field = script_options(benchmark).__dataclass_fields__["protocol"]
    known = told(field)["parser"]["choices"]
    if given.get("protocol", known[0]) not in known:
        return f"whose protocols are {' and '.join(known)}"
    folder = Path(given.get("data_dir", "data"), benchmark)
    if benchmark == "miniimagenet" and not embedded and not folder.is_dir():
        return f"which cannot be downloaded and is not in {folder}; python main_{benchmark}.py says where to get it"
    return None


def split_flags(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Arguments as flags, each with its values."""
    flag: list[str] = []
    for argument in arguments:
        if argument.startswith("--") and flag:
            yield flag
            flag = []
        flag.append(argument)
    if flag:
        yield flag


def flag_name(flag: Sequence[str]) -> str:
    """The name of a flag that `split_flags` gave."""
    return flag[0].partition("=")[0].removeprefix("--")


def script_options(benchmark: str) -> type[Options]:
    """The hyperparameters of a benchmark's script."""
    return importlib.import_module(f"main_{benchmark}").Hyperparameters


def is_foreign(name: str, options: type[Options], method: type[Method]) -> bool:
    """Whether a flag is one that other methods read and this one does not."""
    return name not in cli.all_flags(options, method) and bool(cli.readers(name, options, METHODS))


def check_readers(flags: Sequence[Sequence[str]], plan: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError where a flag is of methods none of which runs."""
    for name in map(flag_name, flags):
        pairs = [(script_options(benchmark), METHODS[m]) for benchmark, methods in plan.items() for m in methods]
        if pairs and all(is_foreign(name, *pair) for pair in pairs):
            readers = ", ".join(cli.readers(name, pairs[0][0], METHODS))
            raise InputError(f"--{name} is a flag of {readers}, which this command does not run; add --methods")


def check_decisive(sweep: tuple[str, tuple[str, ...]] | None, plan: Mapping[str, Sequence[str]]) -> None:
    """Raise InputError where what is swept does not decide what a run measures."""
    for options in map(script_options, plan if sweep else ()):
        field = options.__dataclass_fields__.get(sweep[0])
        if field is not None and not told(field)["affects_results"]:
            raise InputError(f"--sweep {sweep[0]}: it changes nothing that a run measures; sweep a hyperparameter")


def flags_for(benchmark: str, method: type[Method], embedded: bool, flags: Sequence[Sequence[str]]) -> list[str]:
    """Of the usual and the given flags, those that a script takes for a method."""
    usual = ["--data", "embedded", *shlex.split(EMBEDDED[benchmark])] if embedded else []
    options = script_options(benchmark)
    given = [*split_flags(usual), *flags]
    return [argument for flag in given if not is_foreign(flag_name(flag), options, method) for argument in flag]


def make_job(name: str, benchmark: str, flags: Sequence[str], output_dir: Path, swept: str | None = None) -> Job:
    """One script's run. Its parser looks at the flags, so that a mistyped one is said once and before anything runs."""
    script = f"main_{benchmark}.py"
    options, method = cli.parse(script_options(benchmark), METHODS, flags, None, prog=script)
    if swept is not None and (idle := [line for line in unread(options, method) if line.startswith(f"{swept} ")]):
        raise InputError(f"--sweep {idle[0]}, and {benchmark}'s is {options.schedule}; add --schedule plateau")
    command = (sys.executable, "-u", str(ROOT / script), *flags)
    # A log is named by all that decides the command.
    digest = hashlib.sha256(shlex.join(flags).encode()).hexdigest()[:8]
    return Job(
        name=name,
        command=command,
        log=output_dir / "logs" / f"{name.replace(' ', '-')}-{digest}.log",
        folder=run_folder(options, method, benchmark, options.data),
        hyperparameters=results_options(options, method) | {"data_dir": options.data_dir},
        n_epochs=options.n_epochs,
    )
