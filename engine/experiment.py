"""A whole run: tasks one after another, measured after each, in a folder from which it can be continued."""

from __future__ import annotations

import dataclasses
import json
import time
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from engine import distributed, fingerprint, hardware, record
from engine.classes import describe, describe_model
from engine.contract import check_instance, check_modules, state_modules
from engine.files import write_json, write_text
from engine.folder import (
    DIVERGED,
    forget,
    hold,
    keep_weights,
    kept_weights,
    leave_nothing,
    load_checkpoint,
    run_folder,
    save_checkpoint,
    save_last,
)
from engine.interrupts import Stopped, deferred, stoppable
from engine.method import Method
from engine.options import Options, hyperparameters, overridden, results_options, unread, variant
from engine.progress import Progress, print_result, tell, tolerate_consoles
from engine.run_tasks import RunTasks
from engine.same import check_same, of_summary, other_code
from engine.shorter import from_shorter
from engine.standing import Epoch, TaskProgress
from engine.task import Benchmark, batches, join
from engine.testing import Tester
from engine.training import train_task
from gradproj import normalization
from gradproj.errors import DivergenceError, InputError, one_line
from gradproj.interference import interference

CHECKPOINT_SECONDS = 60  # within a task, save at most this often, so that short runs pay nothing
EPOCHS = "epochs.jsonl"
INTERFERENCE_IMAGES = 256  # of the first task, to measure how far its layer outputs moved
# What a checkpoint keeps of a run as it is, besides the states of network, method and task.
CHECKPOINT_FIELDS = (
    "position accuracy columns statistics first interference epochs seconds threads network initial commits devices "
    "shared frozen".split()
)


def run(options: Options, benchmark: Benchmark, model: nn.Module, method: Method) -> dict[str, Any]:
    """Learn a benchmark's tasks in order and leave a run folder; the same call again continues where it stopped.

    Args:
        options: every hyperparameter.
        benchmark: the tasks, on any device.
        model: freshly initialised; called as `model(images, task)`.
        method: made of this model and these options.
    Returns:
        the content of summary.json.
    Raises:
        InputError: options, tasks, model and method do not fit each other, the folder cannot be written or holds
            another run, or another process is at work in it.
        DivergenceError: a loss is infinite or NaN.
        Stopped: by SIGTERM or SIGINT; the last epoch boundary is saved.
    """
    tolerate_consoles()
    check_belonging(options, model, method)
    distributed.check_shareable(method)
    threads = torch.get_num_threads()
    try:
        with stoppable():
            state = Run(benchmark, method)  # before the folder is made: what is refused leaves nothing
            with hold(state.folder):
                return state.go()
    finally:
        torch.set_num_threads(threads)  # small networks take one


def check_belonging(options: Options, model: nn.Module, method: Method) -> None:
    """Raise InputError where a method was made of another model or other options than the run's."""
    check_instance(method)
    if method.model is not model:
        raise InputError(f"method {method.name} was made of another model than the run's; give both the same")
    for field in dataclasses.fields(options):
        here, there = getattr(options, field.name), getattr(method.options, field.name)
        if here != there and field.name != "method":
            raise InputError(f"method {method.name} was made with {field.name} {there}, the run has {here}")


class Run:
    """The state of a run between its beginning and its summary."""

    def __init__(self, benchmark: Benchmark, method: Method) -> None:
        self.options, self.benchmark, self.method = method.options, benchmark, method
        self.title = f"{benchmark.name} ({benchmark.data} data), {method.name}, seed {self.options.seed}"
        self.device = hardware.pick_device(self.options.device)
        model = method.model.to(self.device)
        hardware.tune(self.device, model, self.options)
        method.load_state_dict(method.state_dict())  # onto the device of the model
        if self.options.batchnorm == "task" and not normalization.batch_norms(model):
            raise InputError(f"batchnorm is task, but {type(model).__name__} has no BatchNorm; leave the flag out")
        self.tasks = RunTasks(benchmark, method, self.device)
        self.folder = run_folder(self.options, type(method), benchmark.name, benchmark.data)
        self.state_modules = state_modules(method)
        self.network, self.initial = fingerprint.of_network(model, method.given_frozen), fingerprint.of_initial(model)
        self.frozen = fingerprint.frozen_parameters(model)  # outside `learning`, which freezes for its own time
        self.position = 0  # tasks learned
        self.task_progress: TaskProgress | None = None  # of the task at hand
        self.accuracy: dict[str, list[list[float | None]]] = {"valid": [], "test": [], "class_incremental": []}
        self.columns: dict[str, list[int]] = {}
        self.statistics: list[normalization.Statistics] = []  # of each task, with --batchnorm task
        self.first: dict[str, Tensor] = {}  # the network after the first task, to measure interference by
        self.interference: dict[str, Any] | None = None  # measured at the end
        self.epochs: list[dict[str, Any]] = []
        self.seconds = {"train": 0.0, "memory": 0.0, "evaluate": 0.0}
        self.threads = torch.get_num_threads()  # numbers depend on it in their last bits
        # What the run is made by: more than one where it is continued by other code or elsewhere.
        several = f", {n} processes" if (n := distributed.n_processes()) > 1 else ""
        self.here = hardware.describe(self.device) + several
        self.commits, self.devices = [hardware.commit()], [self.here]
        self.shared = distributed.differences(model)  # what several processes make otherwise than one
        self.saved_at = time.monotonic()
        self.resume_notes: list[str] = []  # where it goes on from

    def go(self) -> dict[str, Any]:
        """Learn every task that is left, then sum up."""
        options = self.options
        if options.no_resume:
            forget(self.folder)
        resumed = self.resume()
        finished = record.read_summary(self.folder)
        if finished is not None and (self.position == options.n_tasks or not resumed):
            if "tasks" in finished and not (self.folder / record.MATRIX).exists():  # an older version's names none
                record.write_matrix(self.folder, finished)
            tell(f"finished already, in {self.folder} (--no_resume runs it again)")
            for line in self.resume_notes:
                if line.startswith("note"):
                    tell(line)
            if options.keep == "each" and not kept_weights(self.folder) and options.n_tasks > 1:
                tell("note: it did not keep the weights after each task; --no_resume --keep each does")
            print_result(finished)
            return finished
        first = options.n_tasks - 1 if self.method.joint else 0
        self.progress = Progress(self.title, options, self.folder, done=self.position, first=first)
        try:
            self.announce()
            write_json(self.folder / "config.json", self.config())
            (self.folder / DIVERGED).unlink(missing_ok=True)
            self.write_epochs()
            for t in [options.n_tasks - 1] if self.method.joint else range(self.position, options.n_tasks):
                if t >= self.position:
                    self.learn(t)
        except Stopped:
            self.save()
            self.progress.say(f"stopped; the same command continues from {self.folder}")
            raise
        except DivergenceError as error:
            with suppress(InputError):  # that it cannot be written is the lesser news
                write_text(self.folder / DIVERGED, f"{error}\n")
            raise
        except InputError:
            leave_nothing(self.folder)
            raise
        finally:
            self.progress.close()
        return self.finish()

    def announce(self) -> None:
        """Say what is run, from where on, and what one has to know of it; take the threads that it began with."""
        say = self.progress.say
        say(f"{self.title}: {self.here}, folder {self.folder}")
        of_options = [*overridden(self.options, type(self.method)), *unread(self.options, type(self.method))]
        for note in (*of_options, *self.benchmark.notes, *self.shared):
            say(f"note: {note}")
        for line in self.resume_notes:
            say(line)
        if self.threads != torch.get_num_threads():
            threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
            say(f"with {threads}, as it began, so that it ends in the same last bits")
            torch.set_num_threads(self.threads)

    def learn(self, t: int) -> None:
        """Train on task t, let the method remember it, and test all tasks so far."""
        task = join(self.tasks, self.options.n_tasks) if self.method.joint else self.tasks[t]
        began = time.perf_counter()
        if self.task_progress is None:
            self.task_progress = TaskProgress.beginning(self.options)
            self.method.before_task(t, task)
            self.frozen = fingerprint.frozen_parameters(self.method.model)
            check_modules(self.method, self.state_modules)
        with self.method.learning(t, task):
            train_task(self.method, t, task, self.task_progress, self.epoch_done, began)
        began = time.perf_counter()
        self.method.after_task(t, task)
        check_modules(self.method, self.state_modules)
        memory_seconds = time.perf_counter() - began
        began = time.perf_counter()
        if self.options.batchnorm == "task":
            learned = range(self.options.n_tasks) if self.method.joint else [t]
            self.statistics[learned[0] :] = [self.training_statistics(j) for j in learned]
        rows = Tester(self.method, self.statistics, self.tasks).rows(t + 1)
        evaluate_seconds = time.perf_counter() - began
        memory, n_tasks = self.method.memory, self.options.n_tasks
        with deferred():
            for part, row in rows.items():
                unmeasured = [[None] * n_tasks] * (t - len(self.accuracy[part]))  # of tasks learned jointly
                self.accuracy[part] += [*unmeasured, row + [None] * (n_tasks - len(row))]
            for key, k in memory.columns.items() if memory else ():
                self.columns.setdefault(key, []).append(k)
            if t == 0 and not self.method.joint:
                self.first = {name: value.clone() for name, value in self.method.model.state_dict().items()}
            self.seconds["memory"] += memory_seconds
            self.seconds["evaluate"] += evaluate_seconds
            self.position, self.task_progress = t + 1, None
            self.frozen = fingerprint.frozen_parameters(self.method.model)
            if self.options.keep == "each" and self.position < n_tasks:  # the last is in the checkpoint
                keep_weights(self.folder, t, self.method.weights())
            self.save()
        self.progress.task(t, task.name, self.accuracy["test"], memory, self.method.learns_when_full)

    def measure_interference(self) -> dict[str, dict[str, Any]]:
        """How far the first task's layer outputs have moved; empty where one network does not serve all tasks."""
        model = self.method.model
        if not self.first or self.options.n_tasks == 1 or not self.method.one_network:
            return {}
        images = self.tasks.held_out(0).test.images[:INTERFERENCE_IMAGES]
        with suppress(InputError):  # layers that no memory could look at, of methods that need none
            return interference(model, self.method.shared_layers(), self.first, lambda: model(images, 0))
        return {}

    def training_statistics(self, j: int) -> normalization.Statistics:
        """BatchNorm's statistics over the training images of task j."""
        model = self.method.model
        images = self.tasks[j].train.images
        parts = [images[start:stop] for start, stop in batches(len(images), self.options.batch_size_test)]
        with self.method.testing(j):
            return normalization.training_statistics(model, lambda images: model(images, j), parts)

    def epoch_done(self, epoch: Epoch) -> None:
        """Record an epoch and, now and then, save."""
        line = dataclasses.asdict(epoch)
        if self.method.memory and self.position:
            line["leak"] = self.method.memory.leak(self.task_progress.start)
        self.epochs.append(line)
        with suppress(OSError), (self.folder / EPOCHS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")  # for whoever watches; `save` writes it whole
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
            "method_class": describe(type(self.method)),
            "sources": self.benchmark.sources,
            "tasks": self.tasks.known,
            "model": progress.weights if boundary else self.method.weights(),
            "method": progress.method if boundary else self.method.state_dict(),
            "task_progress": progress.state_dict() if boundary else None,
            **{name: getattr(self, name) for name in CHECKPOINT_FIELDS},
        }

    def save(self) -> None:
        """Write the checkpoint and the epochs so far."""
        save_checkpoint(self.folder, self.state_dict())
        self.write_epochs()
        self.saved_at = time.monotonic()

    def write_epochs(self) -> None:
        """Write epochs.jsonl."""
        write_text(self.folder / EPOCHS, "".join(json.dumps(epoch) + "\n" for epoch in self.epochs))

    def resume(self) -> bool:
        """Go on from the folder's checkpoint, else from that of a run with fewer tasks, if there is one.

        Raises:
            InputError: the folder holds another run, or a state that does not fit.
        """
        state, wanted = load_checkpoint(self.folder), self.state_dict()
        finished = record.read_summary(self.folder) if state is None else None
        if finished is not None:  # its checkpoint was deleted, perhaps to save space
            check_same(self.folder, of_summary(self.folder, finished, wanted["hyperparameters"]), wanted, self.tasks)
            self.resume_notes = other_code([finished.get("commit")], self.commits[0])
            return False
        try:
            if state is not None:
                check_same(self.folder, state, wanted, self.tasks)
            elif not self.options.no_resume:
                state, self.resume_notes = from_shorter(self.folder, wanted, self.method, self.benchmark, self.tasks)
            if state is None:
                return False
            self.load_state_dict(state)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            reason = one_line(error)
            raise InputError(
                f"the checkpoint in {self.folder} is of another model or program ({reason}); choose another folder, "
                "or start afresh with --no_resume"
            ) from error
        if not self.resume_notes:
            epoch = f", after epoch {self.task_progress.epoch}" if self.task_progress else ""
            n_tasks = self.options.n_tasks
            self.resume_notes = [f"continued from its checkpoint at task {self.position + 1}/{n_tasks}{epoch}"]
            if self.position == n_tasks:
                self.resume_notes = ["all tasks are learned; the summary is made from the checkpoint"]
        self.resume_notes += other_code(state.get("commits", ()), wanted["commits"][0])
        if self.initial not in ({}, wanted["initial"]):
            self.resume_notes.append(
                "note: the network given begins with other weights than this run's, which goes on from its own"
            )
        return True

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, perhaps of an older version."""
        self.method.load_state_dict(state["method"])
        self.method.load_weights(state["model"])
        if state["task_progress"] is not None:
            self.task_progress = TaskProgress.from_state_dict(state["task_progress"])
        since = {"threads": self.threads, "interference": None, "network": self.network, "initial": {}}
        state = since | {"commits": [], "devices": [], "shared": [], "frozen": self.frozen} | state
        here = {name: getattr(self, name) for name in ("commits", "devices", "shared")}
        for name in CHECKPOINT_FIELDS:
            setattr(self, name, state[name])
        for name, p in self.method.model.named_parameters():
            if p.requires_grad == (name in self.frozen):
                p.requires_grad_(not p.requires_grad)
        for name, values in here.items():
            setattr(self, name, list(dict.fromkeys(getattr(self, name) + values)))
        unmeasured = [[None] * self.options.n_tasks] * self.position
        self.accuracy = {part: self.accuracy.get(part, unmeasured) for part in ("valid", "test", "class_incremental")}

    def config(self) -> dict[str, Any]:
        """config.json: all that decides the run's numbers, and where it ran."""
        notes = [*self.benchmark.notes, *self.shared]
        return {
            "benchmark": self.benchmark.name,
            "hyperparameters": hyperparameters(self.options, type(self.method)),
            "model": describe_model(self.method.model),
            "method": describe(type(self.method)),
            "network": self.network,
            "data": {"kind": self.benchmark.data, "sources": self.benchmark.sources, "notes": notes},
            "tasks": self.tasks.known,
            "device": "; ".join(self.devices),
            "versions": hardware.versions(),
            "commit": ", ".join(filter(None, self.commits)) or None,
        }

    def finish(self) -> dict[str, Any]:
        """Keep the last state alone, and write the summary and the matrix."""
        if self.interference is None:
            self.interference = self.measure_interference()
        self.first = {}
        self.tasks.meet_all()  # an older version's run names none
        save_last(self.folder, self.state_dict())
        options, method, config = self.options, type(self.method), self.config()
        class_incremental = self.accuracy["class_incremental"]
        summary = {
            "benchmark": self.benchmark.name,
            "method": method.name,
            "title": vars(method).get("title", method.name),  # what it inherits is another's
            "place": vars(method).get("place"),
            "task_identity": method.task_identity or options.batchnorm == "task",
            "variant": variant(options, method),
            "seed": options.seed,
            "protocol": options.protocol,
            "data": config["data"],
            "tasks": config["tasks"],
            "network": {"class": self.network["class"], "fingerprint": fingerprint.network_digest(self.network)},
            **record.scores(self.accuracy["test"]),
            "accuracy": self.accuracy["test"],
            "valid_accuracy": self.accuracy["valid"],
            "class_incremental": class_incremental
            if any(x is not None for row in class_incremental for x in row)
            else None,
            "memory_columns": self.columns,
            "memory_input_sizes": self.method.memory.input_sizes if self.method.memory else {},
            "memory_floats": self.method.memory_floats(),
            "interference": self.interference,
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
        write_json(self.folder / "config.json", config)  # which names all tasks now
        record.write_summary(self.folder, summary)
        print_result(summary)
        return summary
