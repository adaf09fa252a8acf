"""A whole run: tasks one after another, measured after each, in a folder from which it can be continued."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine import hardware, record
from engine.evaluation import evaluate
from engine.files import write_json, write_text
from engine.folder import (
    check_same_images,
    check_same_run,
    hold,
    load_checkpoint,
    remove_checkpoint,
    run_folder,
    save_checkpoint,
)
from engine.interrupts import Stopped, deferred, stoppable
from engine.loading import describe, describe_model
from engine.method import Method
from engine.options import Options, check, hyperparameters, overridden, results_options, variant
from engine.progress import Progress
from engine.standing import Epoch, TaskProgress
from engine.task import PARTS, Benchmark, Split, Task, batches, join
from engine.training import train_task
from gradproj import normalization
from gradproj.errors import InputError
from gradproj.interference import interference

CHECKPOINT_SECONDS = 60  # within a task, save at most this often, so that short runs pay nothing
EPOCHS = "epochs.jsonl"
INTERFERENCE_IMAGES = 256  # of the first task, to measure how far its layer outputs moved


def run(options: Options, benchmark: Benchmark, model: nn.Module, method: Method) -> dict[str, Any]:
    """Learn a benchmark's tasks in order and leave a run folder; the same call again continues where it stopped.

    Args:
        options: every hyperparameter.
        benchmark: the tasks, their tensors on the device that `options.device` names.
        model: freshly initialised; called as `model(images, task)`.
        method: made of this model and these options.
    Returns:
        the content of summary.json.
    Raises:
        InputError: the options cannot be used, the folder cannot be written, or another process holds it.
        DivergenceError: a loss is infinite or NaN.
        Stopped: by SIGTERM or SIGINT; the last epoch boundary is saved.
    """
    check(options)
    check_belonging(options, model, method)
    folder = run_folder(method.options, type(method), benchmark.name, benchmark.data)
    threads = torch.get_num_threads()
    try:
        with stoppable():
            state = Run(benchmark, method, folder)  # before the folder is made: what is refused leaves nothing
            with hold(folder):
                return state.go()
    finally:
        torch.set_num_threads(threads)  # small networks take one


def check_belonging(options: Options, model: nn.Module, method: Method) -> None:
    """Raise InputError where a method was made of another model or other options than the run's."""
    if method.model is not model:
        raise InputError(f"method {method.name} was made of another model than the run's; give both the same")
    for field in dataclasses.fields(options):
        here, there = getattr(options, field.name), getattr(method.options, field.name)
        if here != there and field.name != "method":
            raise InputError(f"method {method.name} was made with {field.name} {there}, the run has {here}")


class Run:
    """The state of a run between its beginning and its summary."""

    def __init__(self, benchmark: Benchmark, method: Method, folder: Path) -> None:
        self.options, self.benchmark, self.method, self.folder = method.options, benchmark, method, folder
        self.title = f"{benchmark.name} ({benchmark.data} data), {method.name}, seed {self.options.seed}"
        self.device = hardware.pick_device(self.options.device)
        model = method.model.to(self.device)
        hardware.tune(self.device, model, self.options)
        method.load_state_dict(method.state_dict())  # onto the device of the model
        if self.options.batchnorm == "task" and not normalization.batch_norms(model):
            raise InputError(f"batchnorm is task, but {type(model).__name__} has no BatchNorm; leave the flag out")
        self.position = 0  # tasks learned
        self.task_progress: TaskProgress | None = None  # of the task at hand
        self.accuracy: dict[str, list[list[float | None]]] = {"valid": [], "test": []}
        self.columns: dict[str, list[int]] = {}
        self.statistics: list[normalization.Statistics] = []  # of each task, with --batchnorm task
        self.first: dict[str, Tensor] = {}  # the network after the first task, to measure interference by
        self.epochs: list[dict[str, Any]] = []
        self.seconds = {"train": 0.0, "memory": 0.0, "evaluate": 0.0}
        self.threads = torch.get_num_threads()  # numbers depend on it in their last bits
        self.saved_at = time.monotonic()

    def go(self) -> dict[str, Any]:
        """Learn every task that is left, then sum up."""
        options, benchmark = self.options, self.benchmark
        if options.no_resume:
            remove_checkpoint(self.folder)
            (self.folder / "summary.json").unlink(missing_ok=True)
        resumed = self.resume()
        finished = record.read_summary(self.folder)
        if finished is not None and (self.position == options.n_tasks or not resumed):
            print(f"finished already, in {self.folder} (--no_resume runs it again)")
            print_result(finished)
            return finished
        write_json(self.folder / "config.json", self.config())
        self.write_epochs()
        self.progress = Progress(self.title, options, self.folder, done=self.position)
        self.progress.say(f"{self.title}: {hardware.describe(self.device)}, folder {self.folder}")
        for note in (*overridden(options, type(self.method)), *benchmark.notes):
            self.progress.say(f"note: {note}")
        if resumed:
            epoch = f", after epoch {self.task_progress.epoch}" if self.task_progress else ""
            self.progress.say(f"continued from its checkpoint at task {self.position + 1}/{options.n_tasks}{epoch}")
            if self.threads != torch.get_num_threads():
                threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
                self.progress.say(f"with {threads}, as it began, so that it ends in the same last bits")
                torch.set_num_threads(self.threads)
        try:
            seen = []
            for t in range(options.n_tasks):
                task = benchmark.tasks[t]
                seen.append({"valid": task.valid, "test": task.test})
                if self.method.joint and t == options.n_tasks - 1 and t >= self.position:
                    self.learn(t, join(benchmark.tasks, options.n_tasks), seen)
                elif not self.method.joint and t >= self.position:
                    self.learn(t, task, seen)
        except Stopped:
            self.save()
            self.progress.say(f"stopped; the same command continues from {self.folder}")
            raise
        finally:
            self.progress.close()
        return self.finish()

    def learn(self, t: int, task: Task, seen: list[dict[str, Split]]) -> None:
        """Train on task t, let the method remember it, and test all tasks so far."""
        check_task(self.method.model, t, task, self.options)
        if self.task_progress is None:
            self.task_progress = TaskProgress.beginning(self.options)
            self.method.before_task(t, task)
        with self.method.learning(t, task):
            train_task(self.method, t, task, self.task_progress, self.epoch_done)
        began = time.perf_counter()
        self.method.after_task(t, task)
        memory_seconds = time.perf_counter() - began
        began = time.perf_counter()
        if self.options.batchnorm == "task":
            learned = range(self.options.n_tasks) if self.method.joint else [t]
            self.statistics[learned[0] :] = [self.training_statistics(j) for j in learned]
        missing = [None] * (self.options.n_tasks - len(seen))
        rows = {part: [self.test(j, splits[part]) for j, splits in enumerate(seen)] for part in self.accuracy}
        evaluate_seconds = time.perf_counter() - began
        memory = self.method.memory
        with deferred():
            for part, row in rows.items():
                unmeasured = [[None] * self.options.n_tasks] * (
                    t - len(self.accuracy[part])
                )  # of tasks learned jointly
                self.accuracy[part] += [*unmeasured, row + missing]
            for key, k in memory.columns.items() if memory else ():
                self.columns.setdefault(key, []).append(k)
            if t == 0 and not self.method.joint:
                self.first = {name: value.clone() for name, value in self.method.model.state_dict().items()}
            self.seconds["memory"] += memory_seconds
            self.seconds["evaluate"] += evaluate_seconds
            self.position, self.task_progress = t + 1, None
            self.save()
        self.progress.task(t, task.name, self.accuracy["test"], memory)

    def test(self, j: int, split: Split) -> float | None:
        """Accuracy on a split of task j, percent; None where the split is empty."""
        if not len(split.labels):
            return None
        model = self.method.model
        fixed = normalization.fixed_statistics(model, self.statistics[j]) if self.statistics else nullcontext()
        with fixed, self.method.testing(j):
            return evaluate(model, j, split, self.options.batch_size_test)[1]

    def interference(self) -> dict[str, dict[str, Any]]:
        """How far the first task's layer outputs have moved; empty where one network does not serve all tasks."""
        model = self.method.model
        if not self.first or self.options.n_tasks == 1 or not self.method.one_network:
            return {}
        images = self.benchmark.tasks[0].test.images[:INTERFERENCE_IMAGES]
        return interference(model, self.method.shared_layers(), self.first, lambda: model(images, 0))

    def training_statistics(self, j: int) -> normalization.Statistics:
        """BatchNorm's statistics over the training images of task j."""
        model = self.method.model
        images = self.benchmark.tasks[j].train.images
        parts = [images[start:stop] for start, stop in batches(len(images), self.options.batch_size_test)]
        return normalization.training_statistics(model, lambda images: model(images, j), parts)

    def epoch_done(self, epoch: Epoch) -> None:
        """Record an epoch and, now and then, save."""
        line = dataclasses.asdict(epoch)
        if self.method.memory and self.position:
            line["leak"] = self.method.memory.leak(self.task_progress.start)
        self.epochs.append(line)
        with suppress(OSError), (self.folder / EPOCHS).open("a") as file:  # for whoever watches; `save` writes it whole
            file.write(json.dumps(line) + "\n")
        self.seconds["train"] += epoch.seconds
        self.progress.epoch(epoch)
        if time.monotonic() - self.saved_at >= CHECKPOINT_SECONDS:
            self.save()

    def state_dict(self) -> dict[str, Any]:
        """All that another process needs to go on: within a task, as of its last epoch boundary."""
        progress = self.task_progress
        boundary = progress is not None and progress.weights is not None
        return {
            "hyperparameters": results_options(self.options, type(self.method)),
            "sources": self.benchmark.sources,
            "model": progress.weights if boundary else self.method.weights(),
            "method": progress.method if boundary else self.method.state_dict(),
            "task_progress": progress.state_dict() if boundary else None,
            **{name: getattr(self, name) for name in self.kept},
        }

    kept = ("position", "accuracy", "columns", "statistics", "first", "epochs", "seconds", "threads")

    def save(self) -> None:
        """Write the checkpoint and the epochs so far."""
        save_checkpoint(self.folder, self.state_dict())
        self.write_epochs()
        self.saved_at = time.monotonic()

    def write_epochs(self) -> None:
        """Write epochs.jsonl."""
        write_text(self.folder / EPOCHS, "".join(json.dumps(epoch) + "\n" for epoch in self.epochs))

    def resume(self) -> bool:
        """Go on from the folder's checkpoint, if there is one."""
        state, wanted = load_checkpoint(self.folder), results_options(self.options, type(self.method))
        if state is None:
            finished = record.read_summary(self.folder)  # perhaps its checkpoint was deleted to save space
            if finished is not None:
                found = {name: finished["hyperparameters"].get(name) for name in wanted}
                check_same_run(self.folder, found, json.loads(json.dumps(wanted)))
                known = finished["data"].get("sources", self.benchmark.sources)
                check_same_images(self.folder, known, self.benchmark.sources)
            return False
        try:
            hyperparameters, sources = state["hyperparameters"], state.get("sources", self.benchmark.sources)
        except (AttributeError, KeyError, TypeError) as error:
            raise self.of_another_program(error) from error
        check_same_run(self.folder, hyperparameters, wanted)
        check_same_images(self.folder, sources, self.benchmark.sources)
        try:
            self.method.load_state_dict(state["method"])
            self.method.load_weights(state["model"])
            if state["task_progress"] is not None:
                self.task_progress = TaskProgress.from_state_dict(state["task_progress"])
            for name in self.kept:
                setattr(self, name, state.get(name, self.threads) if name == "threads" else state[name])
        except (AttributeError, InputError, KeyError, RuntimeError, TypeError) as error:
            raise self.of_another_program(error) from error
        return True

    def of_another_program(self, error: Exception) -> InputError:
        """What to say of a checkpoint that does not fit."""
        reason = " ".join(str(error).split())[:200]
        return InputError(
            f"the checkpoint in {self.folder} is of another model or program ({reason}); choose another folder, "
            "or start afresh with --no_resume"
        )

    def config(self) -> dict[str, Any]:
        """config.json: all that decides the run's numbers, and where it ran."""
        return {
            "benchmark": self.benchmark.name,
            "hyperparameters": hyperparameters(self.options, type(self.method)),
            "model": describe_model(self.method.model),
            "method": describe(type(self.method)),
            "data": {"kind": self.benchmark.data, "sources": self.benchmark.sources, "notes": self.benchmark.notes},
            "device": hardware.describe(self.device),
            "versions": hardware.versions(),
            "commit": hardware.commit(),
        }

    def finish(self) -> dict[str, Any]:
        """Write the summary and the matrix."""
        options, method, config = self.options, type(self.method), self.config()
        summary = {
            "benchmark": self.benchmark.name,
            "method": method.name,
            "title": method.title or method.name,
            "place": method.place,
            "task_identity": method.task_identity,
            "variant": variant(options, method),
            "seed": options.seed,
            "protocol": options.protocol,
            "data": config["data"],
            **record.scores(self.accuracy["test"]),
            "accuracy": self.accuracy["test"],
            "valid_accuracy": self.accuracy["valid"],
            "memory_columns": self.columns,
            "memory_input_sizes": self.method.memory.input_sizes if self.method.memory else {},
            "memory_floats": self.method.memory_floats(),
            "interference": self.interference(),
            "epochs": [sum(epoch["task"] == t for epoch in self.epochs) for t in range(options.n_tasks)],
            "seconds": {"total": sum(self.seconds.values()), **self.seconds},
            "hyperparameters": config["hyperparameters"],
            "device": config["device"],
            "versions": config["versions"],
            "commit": config["commit"],
            "folder": str(self.folder),
            "finished": True,
        }
        self.write_epochs()  # again, since the process that saved the last state may have been killed before it did
        record.write_summary(self.folder, summary)
        print_result(summary)
        return summary


@torch.no_grad()
def check_task(model: nn.Module, t: int, task: Task, options: Options) -> None:
    """Raise InputError where a model cannot take a task: single images, or more classes than it has outputs."""
    model.eval()
    alone = [
        f"{name} is 1" for name in ("batch_size_train", "batch_size_test", "n_samples") if getattr(options, name) == 1
    ]
    alone += [f"{task.name} has a single {part} image" for part in PARTS if len(getattr(task, part).labels) == 1]
    if alone:
        try:
            model(task.train.images[:1], t)
        except ValueError as error:  # BatchNorm's
            why = f"{type(model).__name__} cannot take an image alone ({error})"
            raise InputError(f"{'; '.join(alone)}; it must be 2 or more, since {why}") from error
    outputs = model(task.train.images[:2], t).shape[1]
    if outputs < task.n_classes:
        raise InputError(
            f"{type(model).__name__} has {outputs} outputs for the {task.n_classes} classes of {task.name}"
        )


def print_result(summary: dict[str, Any]) -> None:
    """The numbers of a finished run, in two lines."""
    transfer = summary["backward_transfer"]
    print(
        f"{summary['benchmark']} ({summary['data']['kind']} data), {summary['method']}, seed {summary['seed']}: "
        f"ACC {summary['average_accuracy']:.2f} %, "
        + ("" if transfer is None else f"BWT {transfer:+.2f}, ")
        + f"{summary['seconds']['total']:.0f} s"
    )
    print(f"  {summary['folder']}/summary.json, accuracy.csv")
