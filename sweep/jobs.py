"""Runs as processes, several at a time, here or on a cluster: started, watched by what their folders hold, stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from engine import hardware
from engine.experiment import EPOCHS
from engine.interrupts import ending_with_parent
from engine.record import read_summary, scores_in_words
from engine.same import plain
from gradproj.errors import InputError
from methods import METHODS
from report import tables
from report.runs import position_of
from sweep.cluster import Cluster, RemoteProcess

POLL_SECONDS = 0.3
STOP_SECONDS = 30  # a stopped run may take this long to save its state


class Job(NamedTuple):
    """One run to make."""

    name: str  # for people: benchmark method seed
    command: tuple[str, ...]
    log: Path
    folder: Path
    hyperparameters: dict[str, Any]  # that a run in its folder must have had, to be this one
    n_epochs: int  # of a task, at most


@dataclass
class Running:
    """A job at work, and how far it has come."""

    job: Job
    process: subprocess.Popen | RemoteProcess
    bar: tqdm
    position: int  # of the bar on the screen
    log_start: int  # bytes of its log that earlier starts wrote
    finished: dict[str, Any] | None  # the summary that was there before
    started: float = field(default_factory=time.monotonic)
    size: int = -1  # of its epochs.jsonl when that was read last
    task: int = 0  # the last that it has begun

    def new_epoch(self) -> dict[str, Any] | None:
        """The last epoch in its folder, if there is a new one."""
        path = self.job.folder / EPOCHS
        if (size := _size(path)) == self.size:
            return None
        self.size = size
        try:
            return json.loads(path.read_text(encoding="utf-8").rpartition("\n")[0].rpartition("\n")[2])
        except (OSError, ValueError):  # not there yet, or its last line is only half written
            return None


@dataclass
class Outcome:
    """What became of the jobs."""

    folders: list[Path] = field(default_factory=list)  # of the finished runs
    failed: list[Job] = field(default_factory=list)


def is_finished(job: Job, commit: str | None) -> bool:
    """Whether the job's folder holds the summary of this very run, with nothing left to do. Where that is not certain,
    as with images from another folder or code that has changed since, the script itself has to look.

    Args:
        job: the run.
        commit: of the code, as `engine.hardware.commit` gives it.
    """
    summary = read_summary(job.folder)
    if summary is None or "--no_resume" in job.command:
        return False
    if commit is None or summary.get("commit") != commit:
        return False
    wanted = plain(job.hyperparameters)
    return all(summary["hyperparameters"].get(name) == value for name, value in wanted.items())


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
    outcome, waiting, running, commit = Outcome(), list(jobs), [], hardware.commit()
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"}  # of the logs
    total = tqdm(total=len(jobs), desc="runs", unit="run", position=0, dynamic_ncols=True, **_screen())
    try:
        while waiting or running:
            while waiting and len(running) < n_at_once:
                job = waiting.pop(0)
                if is_finished(job, commit):
                    say(f"{job.name}: finished before, {job.folder}")
                    outcome.folders.append(job.folder)
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
    """Start a job, its output added to its log."""
    finished, size = read_summary(job.folder), _size(job.folder / EPOCHS)
    found = ""
    if "--no_resume" not in job.command:
        found = "to see whether what is finished there is this run" if finished else position_of(job.folder)
    taken = {member.position for member in running}
    position = next(i for i in range(1, len(taken) + 2) if i not in taken)
    try:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a", encoding="utf-8") as log:
            log_start = log.tell()
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
    say(f"{job.name}: started, log {job.log}" + (f", {found}" if found else ""))
    bar = tqdm(total=1, desc=job.name, unit="epoch", position=position, leave=False, dynamic_ncols=True, **_screen())
    return Running(job, process, bar, position, log_start, finished, size=size)


def show(member: Running) -> None:
    """Bring a job's bar up to date, and say when it has learned a task."""
    if epoch := member.new_epoch():
        n_epochs, n_tasks = member.job.n_epochs, member.job.hyperparameters["n_tasks"]
        is_joint = METHODS[member.job.hyperparameters["method"]].joint  # all tasks are learned in the epochs of one
        learned = 0 if is_joint else epoch["task"]
        if learned > member.task:
            say(f"{member.job.name}: {learned} of {n_tasks} tasks learned")
            member.task = learned
        member.bar.total = n_epochs if is_joint else n_tasks * n_epochs
        member.bar.n = learned * n_epochs + epoch["epoch"]
        where = "" if is_joint else f"task {epoch['task'] + 1}/{n_tasks} "
        member.bar.set_postfix_str(f"{where}loss {epoch['train_loss']:.4f}, lr {epoch['lr']:.2g}", refresh=False)
    member.bar.refresh()


def conclude(member: Running, code: int, outcome: Outcome) -> None:
    """Say how a job ended."""
    member.bar.close()
    job, seconds = member.job, tables.duration(time.monotonic() - member.started)
    lines = job.log.read_bytes()[member.log_start :].decode(errors="replace").splitlines()
    if code == 0 and (summary := read_summary(job.folder)) is not None:
        done = f"finished before, {job.folder}" if summary == member.finished else f"{seconds} in all"
        say(f"{job.name}: {scores_in_words(summary)}, {done}")
        for line in lines:
            if "note: it was made by" in line:
                say(f"{job.name}: {line}")
        outcome.folders.append(job.folder)
        return
    outcome.failed.append(job)
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    say(f"{job.name}: FAILED with exit code {code} after {seconds}: {last}")


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


def _size(path: Path) -> int:
    """A file's bytes; -1 where there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _screen() -> dict[str, Any]:
    return {"file": sys.stdout, "disable": not sys.stdout.isatty()}


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
