"""The machine a run is on: which device, how many threads, and what to write down about it."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import subprocess
import warnings
from contextlib import suppress
from pathlib import Path

import torch
from torch import nn

from engine.distributed import local_gpu
from engine.options import Options
from gradproj.errors import InputError
from gradproj.projection import set_tf32

# Multiply-adds of one training step under which a second thread costs more than it brings.
ONE_THREAD_WORK = 10**7


def pick_device(name: str) -> torch.device:
    """The device for a --device value: "auto" is the GPU where there is one.

    Raises:
        InputError: no such device here.
    """
    if name == "auto":
        return torch.device(local_gpu() if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        available = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        raise InputError(f"device {name!r} is not available here; use one of: auto, {available}") from error
    return device


def tune(device: torch.device, model: nn.Module, options: Options) -> None:
    """Settings that make training faster and, TF32 (a flag) apart, leave its mathematics alone.

    - A small fully connected network runs on one CPU thread: handing its few operations to others takes longer.
    - Convolutions run in channels-last layout on a CPU, which its kernels are fastest in.
    - Freed blocks stay with the process (glibc): by default each large activation is returned to the kernel and
      its pages are faulted in again at the next step.
    """
    for backend in (torch.backends.cuda.matmul, torch.backends.cudnn):
        set_tf32(backend, options.tf32)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    if device.type != "cpu":
        return
    if any(isinstance(module, nn.Conv2d) for module in model.modules()):
        model.to(memory_format=torch.channels_last)
    elif options.batch_size_train * sum(p.numel() for p in model.parameters()) < ONE_THREAD_WORK:
        torch.set_num_threads(1)
    if platform.libc_ver()[0] == "glibc":
        libc, mmap_threshold, trim_threshold = ctypes.CDLL(None), -3, -1
        if libc.mallopt(mmap_threshold, 2**30) or libc.mallopt(mmap_threshold, 2**25):  # older versions allow no more
            libc.mallopt(trim_threshold, 2**31 - 1)


def flush_denormals() -> None:
    """Count numbers under 1e-38 as zero: a processor takes a hundred times as long for them, and HAT's gates make many.

    To be called before anything is computed, since each of torch's threads keeps the setting that it began with.
    """
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore", "The value of the smallest subnormal")  # NumPy 1 looks for it, finds zero


def describe(device: torch.device) -> str:
    """The hardware in words, for the record of a run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} thread(s)"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit this code is at, with a + and a checksum of what differs from it where Python files were changed or
    added since; None outside a git checkout."""
    code = ("--", ":(top)*.py", ":(top,exclude)tests", ":(top,exclude,glob)**/site-packages/**")

    def git(*arguments: str) -> bytes:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, timeout=10, check=True
        ).stdout

    try:
        at = git("rev-parse", "--short=12", "HEAD").decode().strip()
        root = Path(os.fsdecode(git("rev-parse", "--show-toplevel")).strip())
        names = git("diff", "--name-only", "-z", "HEAD", *code)
        names += git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", *code)
    except (OSError, subprocess.SubprocessError):
        return None
    differing = hashlib.blake2b(digest_size=4)
    for name in names.split(b"\0"):
        differing.update(name)
        with suppress(OSError):  # it was deleted, or may not be read
            differing.update((root / os.fsdecode(name)).read_bytes() if name else b"")
    return at + (f"+{differing.hexdigest()}" if names else "")


def versions() -> dict[str, str]:
    """The versions that a number depends on."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no memory left for a tensor."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
