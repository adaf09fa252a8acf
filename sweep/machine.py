"""What this machine has for runs side by side: cores, memory, GPUs."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

RUN_BYTES = 6 * 2**30  # of memory that a run may take: joint training on miniImageNet holds 5 GiB of images
RUNS_ON_A_GPU = 4  # as on a cluster: one small network does not fill it


def available_cores() -> int:
    """Processor cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # a container's limit, on Linux
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def available_memory() -> int:
    """Bytes of memory that this machine, or the container this process is in, has in all."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # a container's limit, on Linux
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def wanted_threads() -> int | None:
    """The threads that OMP_NUM_THREADS asks for; None where it says nothing that can be used."""
    text = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # OpenMP takes one number for each level of nesting
    return int(text) if text.isdecimal() and int(text) > 0 else None


def default_jobs(n_jobs: int) -> int:
    """How many of some runs go side by side where nobody says.

    On a CPU two runs with a thread each are done sooner than one after the other with two (docs/performance.md).
    """
    rooms = [n_jobs, available_cores(), available_memory() // RUN_BYTES]
    if torch.cuda.is_available():
        rooms += [RUNS_ON_A_GPU, torch.cuda.get_device_properties(0).total_memory // RUN_BYTES]
    return max(1, min(rooms))
