"""How fast is it? One command measures and prints a table; its numbers go to benchmarks/results/.

    python benchmarks/speed.py                                  # everything, some minutes
    python benchmarks/speed.py --quick                          # under a minute on an idle machine
    python benchmarks/speed.py --threads 1 --only mlp alexnet   # on one CPU thread, two of the networks
    python benchmarks/speed.py --no_run --readme README.md      # rewrite README's table from the recorded results

Variants take turns in one process; times are medians, ratios are medians of ratios taken turn by turn, with their
quartiles. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
NAMES = ("mlp", "alexnet", "lenet", "resnet18")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions; written under another name")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores; the MLP takes one)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, …; auto is cuda where there is one")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="measure these; others stay recorded")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for ratios on a busy machine; with --threads 1 only",
    )
    parser.add_argument("--name", help="of the file in benchmarks/results/ (default: from the device)")
    parser.add_argument("--output_dir", type=Path, default=HERE / "results", help="where the results are kept")
    parser.add_argument("--no_run", action="store_true", help="measure nothing, only show what is recorded")
    parser.add_argument("--readme", type=Path, metavar="FILE", help="rewrite the table between its speed markers")
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"threads is {args.threads}; it must be positive")
    if args.clock == "cpu" and args.threads != 1:
        parser.error("processor time of several threads includes their waiting: give --threads 1 with --clock cpu")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, record, print."""
    args = parse(argv)
    if args.threads is not None:
        # Read when torch and NumPy are first imported, so those imports come after it.
        os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = str(args.threads)
    sys.path.insert(0, str(HERE.parent))
    from benchmarks import table
    from engine.progress import tolerate_consoles

    tolerate_consoles()

    if not args.no_run:
        path = run(args)
        print(table.markdown(json.loads(path.read_text(encoding="utf-8"))))
    else:
        print(table.all_results(args.output_dir))
    if args.readme is not None:
        table.rewrite(args.readme, table.all_results(args.output_dir))


def run(args: argparse.Namespace) -> Path:
    """Measure case after case, recording each as soon as it is there; returns the file."""
    import numpy
    import torch

    from benchmarks.cases import CASES
    from benchmarks.measure import Stopwatch
    from benchmarks.suite import FULL, QUICK, measure
    from engine import hardware
    from engine.files import write_json

    device = hardware.pick_device(args.device)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    default = (
        f"cpu-{torch.get_num_threads()}-threads"
        if device.type == "cpu"
        else "-".join(torch.cuda.get_device_name(device).lower().split())
    )
    path = args.output_dir / f"{args.name or default}{'-quick' if args.quick else ''}.json"
    environment = {
        "hardware": hardware.describe(device),
        "device": device.type,
        "clock": args.clock,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "versions": hardware.versions() | {"numpy": numpy.__version__},
        "commit": hardware.commit(),
        "date": datetime.date.today().isoformat(),
    }
    for name in args.only:
        print(f"measuring {CASES[name].title} …", file=sys.stderr, flush=True)
        result = measure(CASES[name], Stopwatch(device, args.clock), QUICK if args.quick else FULL)
        recorded = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        recorded[name] = result | {"environment": environment}
        write_json(path, {name: recorded[name] for name in NAMES if name in recorded})
    return path


if __name__ == "__main__":
    main()
