"""A whole run: tasks one after another, measured after each, in a folder from which it can be continued."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
from torch import nn

from gpm import hardware, metrics, plots
from gpm.checkpoint import load_checkpoint, remove_checkpoint, save_checkpoint
from gpm.errors import InputError
from gpm.files import write_json, write_text
from gpm.methods import make_method
from gpm.options import Options, check, variant
from gpm.progress import Progress
from gpm.task import Benchmark, Split
from gpm.training import Epoch, TaskProgress, evaluate, start_task, train_task

CHECKPOINT_SECONDS = 60  # within a task, save at most this often, so that short runs pay nothing


def run(options: Options, benchmark: Benchmark, model: nn.Module) -> dict[str, Any]:
    """Learn a benchmark's tasks in order and leave a run folder; the same call again continues where it stopped.

    Args:
        options: every hyperparameter.
        benchmark: the tasks, their tensors on the device that `options.device` names.
        model: freshly initialised; called as `model(images, task)`, its heads (if any) in `model.heads`.
    Returns:
        the content of summary.json.
    Raises:
        InputError: the options cannot be used, the folder cannot be written, or another process holds it.
    """
    check(options)
    folder = run_folder(options, benchmark)
    finished = read_summary(folder)
    if finished is not None:
        if not options.quiet:
            print(f"{folder} is finished already")
        print_result(finished, folder)
        return finished
    with hold(folder):
        return Run(options, benchmark, model, folder).go()


def run_folder(options: Options, benchmark: Benchmark) -> Path:
    """runs/DATA/BENCHMARK/METHOD/VARIANT/seed-N."""
    kind = Path(options.output_dir, benchmark.data, benchmark.name, options.method, variant(options))
    return kind / f"seed-{options.seed}"


def read_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a finished run; None where there is none yet or it cannot be read."""
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) and summary.get("finished") else None


@contextmanager
def hold(folder: Path):
    """Keep other processes from running in the same folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except filelock.Timeout as error:
        raise InputError(f"another process is already at work in {folder}; wait for it or choose another") from error
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another --output_dir") from error
    try:
        yield
    finally:
        lock.release()


class Run:
    """The state of a run between its beginning and its summary."""

    def __init__(self, options: Options, benchmark: Benchmark, model: nn.Module, folder: Path) -> None:
        self.options, self.benchmark, self.folder = options, benchmark, folder
        self.device = hardware.pick_device(options.device)
        if self.device.type == "cpu":
            hardware.tune_cpu(model, options.batch_size_train)
        self.method = make_method(model.to(self.device), options)
        self.position = 0  # tasks learned
        self.task_progress: TaskProgress | None = None  # of the task at hand
        self.accuracy: dict[str, list[list[float | None]]] = {"valid": [], "test": []}
        self.columns: dict[str, list[int]] = {}
        self.epochs: list[dict[str, Any]] = []
        self.seconds = {"train": 0.0, "memory": 0.0, "evaluate": 0.0}
        self.saved_at = time.monotonic()

    def go(self) -> dict[str, Any]:
        """Learn every task that is left, then sum up."""
        options, benchmark = self.options, self.benchmark
        resumed = self.resume()
        title = f"{benchmark.name} ({benchmark.data} data), {options.method}, seed {options.seed}"
        self.progress = Progress(title, options.n_tasks, options.n_epochs, self.position, options.quiet)
        self.progress.say(f"{title}: {hardware.describe(self.device)}, folder {self.folder}")
        for note in benchmark.notes:
            self.progress.say(f"note: {note}")
        if resumed:
            epoch = f", epoch {self.task_progress.epoch + 1}" if self.task_progress else ""
            self.progress.say(f"continued from its checkpoint at task {self.position + 1}/{options.n_tasks}{epoch}")
        else:
            write_json(self.folder / "config.json", self.config())
        seen = []
        for t in range(options.n_tasks):
            task = benchmark.tasks[t]
            seen.append({"valid": task.valid, "test": task.test})
            if t >= self.position:
                self.learn(t, task, seen)
        self.progress.close()
        return self.finish()

    def learn(self, t: int, task, seen: list[dict[str, Split]]) -> None:
        """Train on task t, let the method remember it, and test all tasks so far."""
        if self.task_progress is None:
            self.task_progress = start_task(self.options)
        with self.method.learning(t, task):
            train_task(self.method, t, task, self.options, self.task_progress, self.epoch_done)
        began = time.perf_counter()
        self.method.after_task(t, task)
        self.seconds["memory"] += time.perf_counter() - began
        began = time.perf_counter()
        for part, matrix in self.accuracy.items():
            matrix.append([self.test(j, splits[part]) for j, splits in enumerate(seen)])
            matrix[-1] += [None] * (self.options.n_tasks - len(seen))
        self.seconds["evaluate"] += time.perf_counter() - began
        memory = self.method.memory
        columns, sizes = (memory.columns, memory.input_sizes) if memory else ({}, {})
        for key, k in columns.items():
            self.columns.setdefault(key, []).append(k)
        self.position, self.task_progress = t + 1, None
        self.save()
        self.progress.task(t, task.name, self.accuracy["test"], columns, sizes)

    def test(self, j: int, split: Split) -> float | None:
        """Accuracy on a split of task j, percent; None where the split is empty."""
        if not len(split.labels):
            return None
        return evaluate(self.method.model, j, split, self.options.batch_size_test)[1]

    def epoch_done(self, epoch: Epoch, progress: TaskProgress) -> None:
        """Record an epoch and, now and then, save."""
        self.epochs.append(dataclasses.asdict(epoch))
        self.seconds["train"] += epoch.seconds
        self.progress.epoch(epoch)
        if time.monotonic() - self.saved_at > CHECKPOINT_SECONDS:
            self.save()

    def state_dict(self) -> dict[str, Any]:
        """All that another process needs to go on."""
        return {
            "config": self.config()["hyperparameters"],
            "model": self.method.model.state_dict(),
            "method": self.method.state_dict(),
            "task_progress": self.task_progress.state_dict() if self.task_progress else None,
            **{name: getattr(self, name) for name in ("position", "accuracy", "columns", "epochs", "seconds")},
        }

    def save(self) -> None:
        """Write the checkpoint and the epochs so far."""
        save_checkpoint(self.folder, self.state_dict())
        write_text(self.folder / "epochs.jsonl", "".join(json.dumps(epoch) + "\n" for epoch in self.epochs))
        self.saved_at = time.monotonic()

    def resume(self) -> bool:
        """Go on from the folder's checkpoint, if there is one."""
        state = load_checkpoint(self.folder)
        if state is None:
            return False
        self.method.model.load_state_dict(state["model"])
        self.method.load_state_dict(state["method"])
        if state["task_progress"] is not None:
            self.task_progress = TaskProgress.from_state_dict(state["task_progress"])
        for name in ("position", "accuracy", "columns", "epochs", "seconds"):
            setattr(self, name, state[name])
        return True

    def config(self) -> dict[str, Any]:
        """config.json: all that decides the run's numbers, and where it ran."""
        return {
            "benchmark": self.benchmark.name,
            "hyperparameters": dataclasses.asdict(self.options),
            "data": {"kind": self.benchmark.data, "sources": self.benchmark.sources, "notes": self.benchmark.notes},
            "device": hardware.describe(self.device),
            "versions": hardware.versions(),
            "commit": hardware.commit(),
        }

    def finish(self) -> dict[str, Any]:
        """Write the summary, the matrix and the pictures; the checkpoint is no longer needed."""
        accuracy, options = self.accuracy["test"], self.options
        config = self.config()
        summary = {
            "benchmark": self.benchmark.name,
            "method": options.method,
            "variant": variant(options),
            "seed": options.seed,
            "protocol": options.protocol,
            "data": config["data"],
            "average_accuracy": metrics.average_accuracy(accuracy),
            "backward_transfer": metrics.backward_transfer(accuracy),
            "forgetting": metrics.forgetting(accuracy),
            "accuracy": accuracy,
            "valid_accuracy": self.accuracy["valid"],
            "memory_columns": self.columns,
            "memory_input_sizes": self.method.memory.input_sizes if self.method.memory else {},
            "memory_floats": self.method.memory_floats(),
            "epochs": [sum(epoch["task"] == t for epoch in self.epochs) for t in range(options.n_tasks)],
            "seconds": {"total": sum(self.seconds.values()), **self.seconds},
            "hyperparameters": config["hyperparameters"],
            "device": config["device"],
            "versions": config["versions"],
            "commit": config["commit"],
            "finished": True,
        }
        title = f"{self.benchmark.name} ({self.benchmark.data} data), {options.method}, seed {options.seed}"
        rows = [",".join("" if value is None else f"{value:.4f}" for value in row) for row in accuracy]
        write_text(self.folder / "accuracy.csv", "\n".join(rows) + "\n")
        plots.save(plots.accuracy_heat_map(accuracy, title), self.folder / "accuracy.png")
        if self.columns:
            figure = plots.memory_growth(self.columns, summary["memory_input_sizes"], title)
            plots.save(figure, self.folder / "memory.png")
        write_json(self.folder / "summary.json", summary)
        remove_checkpoint(self.folder)
        print_result(summary, self.folder)
        return summary


def print_result(summary: dict[str, Any], folder: Path) -> None:
    """The numbers of a finished run, in two lines."""
    print(
        f"{summary['benchmark']} ({summary['data']['kind']} data), {summary['method']}, seed {summary['seed']}: "
        f"ACC {summary['average_accuracy']:.2f} %, BWT {summary['backward_transfer']:+.2f}, "
        f"{summary['seconds']['total']:.0f} s"
    )
    print(
        f"  {folder}/summary.json, accuracy.csv, accuracy.png" + (", memory.png" if summary["memory_columns"] else "")
    )
