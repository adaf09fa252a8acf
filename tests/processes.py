"""Several processes as one group, that end with the test whatever happens in them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests import ROOT

SECONDS = 120  # of a group, at most


def environment() -> dict[str, str]:
    """For groups that meet on this machine, also where its own name cannot be looked up."""
    return {**os.environ, "OMP_NUM_THREADS": "1"} | ({"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {})


def run_group(module: str, folder: Path, n: int = 2) -> list[subprocess.CompletedProcess]:
    """Run `python -m MODULE FOLDER RANK N` for each rank; all are killed when time is up."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(folder), str(rank), str(n)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(n)
    ]
    return finished(processes)


def finished(processes: Sequence[subprocess.Popen]) -> list[subprocess.CompletedProcess]:
    """Wait for processes, at most SECONDS for each."""
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [subprocess.CompletedProcess(p.args, p.returncode, out) for p, out in zip(processes, outputs, strict=True)]
