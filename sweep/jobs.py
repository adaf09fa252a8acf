"""Runs as processes, several at a time, here or on a cluster: started, watched by what they print, stopped."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from engine.interrupts import ending_with_parent
from gradproj.errors import InputError
from report import runs as summaries
from report import tables
from sweep.cluster import Cluster, RemoteProcess

# What the scripts print, where it is not a terminal.
EPOCH = re.compile(r"task (\d+)/(\d+) epoch (\d+)/(\d+): (.*)")
LEARNED = re.compile(r"task \d+/\d+ \(.*?\) learned")
REMARK = re.compile(r"(continued|note:|warning:) .*")
FOLDER = re.compile(r"^\s*(\S.*)/summary\.json", re.MULTILINE)
POLL_SECONDS = 0.3
STOP_SECONDS = 30  # a stopped run may take this long to save its state
RUN_BYTES = 5 * 2**30  # of memory that a run may take: joint training on 5-datasets holds 4.3 GiB of images


class Job(NamedTuple):
    """One run to make."""

    name: str  # for people: benchmark method seed
    command: tuple[str, ...]
    log: Path


@dataclass
class Running:
    """A job at work, and what its log has said so far."""

    job: Job
    process: subprocess.Popen | RemoteProcess
    bar: tqdm
    position: int  # of the bar on the screen
    started: float = field(default_factory=time.monotonic)
    read: int = 0
    rest: str = ""

    def news(self) -> list[str]:
        """The whole lines that its log has gained."""
        with self.job.log.open(errors="replace") as file:
            file.seek(self.read)
            text = file.read()
            self.read = file.tell()
        *lines, self.rest = (self.rest + text).split("\n")
        return lines


@dataclass
class Outcome:
    """What became of the jobs."""

    folders: list[Path] = field(default_factory=list)  # of the finished runs
    failed: list[Job] = field(default_factory=list)


def finished_folder(job: Job) -> Path | None:
    """The folder of a job that an earlier sweep has finished, as its log says; None if it has to be (re)started."""
    try:
        folders = FOLDER.findall(job.log.read_text(errors="replace"))
    except OSError:
        return None
    if folders and isinstance(summaries.read_run(Path(folders[-1], "summary.json")), summaries.Run):
        return Path(folders[-1])
    return None


def run_jobs(jobs: Sequence[Job], n_at_once: int, threads: int, cluster: Cluster | None = None) -> Outcome:
    """Run jobs, up to so many at once; a failing one is reported and the others go on.

    Args:
        jobs: in the order to start them.
        n_at_once: processes side by side.
        threads: of each.
        cluster: where they run; on this machine if not given.
    Raises:
        KeyboardInterrupt: after all of them were stopped.
    """
    outcome, waiting, running = Outcome(), list(jobs), []
    environment = {"OMP_NUM_THREADS": str(threads)}
    total = tqdm(total=len(jobs), desc="runs", unit="run", position=0, dynamic_ncols=True, **_screen())
    try:
        while waiting or running:
            while waiting and len(running) < n_at_once:
                job = waiting.pop(0)
                if folder := finished_folder(job):
                    say(f"{job.name}: finished before, {folder}")
                    outcome.folders.append(folder)
                    total.update()
                else:
                    running.append(start(job, environment, running, cluster))
            if running:
                time.sleep(POLL_SECONDS)
            for member in list(running):
                code = member.process.poll()  # before reading, so that the last lines are not missed
                show(member)
                if code is not None:
                    running.remove(member)
                    conclude(member, code, outcome)
                    total.update()
    finally:
        stop(running)
        total.close()
    return outcome


def start(job: Job, environment: dict[str, str], running: Sequence[Running], cluster: Cluster | None) -> Running:
    """Start a job, its output going to its log."""
    taken = {member.position for member in running}
    position = next(i for i in range(1, len(taken) + 2) if i not in taken)
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("w") as log:
            if cluster:
                process = cluster.start(job.command, job.log, environment)
            else:  # in this process's group, so that Ctrl-C reaches it too
                everything = {**os.environ, **environment}
                process = subprocess.Popen(
                    job.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=everything,
                    preexec_fn=ending_with_parent(signal.SIGTERM),  # or it would hold its folder against a repetition
                )
    except OSError as error:
        raise InputError(f"cannot write {job.log}: {error.strerror or error}; choose another --output_dir") from error
    say(f"{job.name}: started, log {job.log}")
    bar = tqdm(total=1, desc=job.name, unit="epoch", position=position, leave=False, dynamic_ncols=True, **_screen())
    return Running(job, process, bar, position)


def show(member: Running) -> None:
    """Bring a job's bar, or the lines about it, up to date."""
    for line in member.news():
        match = EPOCH.search(line)
        if match:
            task, n_tasks, epoch, n_epochs = map(int, match.groups()[:4])
            member.bar.total = n_tasks * n_epochs
            member.bar.n = (task - 1) * n_epochs + epoch
            member.bar.set_postfix_str(f"task {task}/{n_tasks} {match[5]}", refresh=False)
        elif match := LEARNED.match(line) or REMARK.match(line):
            say(f"{member.job.name}: {match[0]}")
    member.bar.refresh()


def conclude(member: Running, code: int, outcome: Outcome) -> None:
    """Say how a job ended."""
    member.bar.close()
    text = member.job.log.read_text(errors="replace")
    folders = FOLDER.findall(text)
    seconds = tables.duration(time.monotonic() - member.started)
    if code == 0 and folders:
        result = next((line for line in reversed(text.splitlines()) if "ACC" in line), "finished")
        say(f"{member.job.name}: {result.rpartition(': ')[2]}, {seconds} in all")
        outcome.folders.append(Path(folders[-1]))
        return
    outcome.failed.append(member.job)
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "it said nothing")
    say(f"{member.job.name}: FAILED with exit code {code} after {seconds}: {last}")


def stop(running: Sequence[Running]) -> None:
    """End every process that is still at work, giving it time to save its state."""
    for member in running:
        with contextlib.suppress(OSError):
            member.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for member in running:
        try:
            member.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            member.process.kill()
            member.process.wait()
        member.bar.close()


def say(text: str) -> None:
    """A line, above the bars."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def _screen() -> dict[str, Any]:
    return {"file": sys.stdout, "disable": not sys.stdout.isatty()}


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


def usual_jobs(n_jobs: int) -> int:
    """How many of some runs go side by side where nobody says.

    On a CPU two runs with a thread each are done sooner than one after the other with two (docs/performance.md).
    """
    if torch.cuda.is_available():
        return 1
    return max(1, min(n_jobs, available_cores(), available_memory() // RUN_BYTES))


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM unwind this process as Ctrl-C does."""

    def unwind(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
