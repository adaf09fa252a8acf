"""Measures one benchmark: its training step in every form, the memory update, evaluation, an epoch."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import plain
from benchmarks.cases import Case
from benchmarks.measure import Spread, Stopwatch, interleaved, matrix_product_rate, ratios
from engine.evaluation import evaluate
from engine.hardware import tune
from engine.steps import EagerSteps, FusedSteps, GraphSteps, Steps, make_steps
from engine.task import Task
from methods.gpm import GPM

FORMS = {EagerSteps: "eager", FusedSteps: "by hand", GraphSteps: "CUDA graph"}
T = 1  # a later task: something is remembered, normalisation is frozen
LR = 1e-3  # the steps are timed, not judged: keep the weights finite on random labels


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: of steps, each variant once a round.
        repetitions: of the memory update and of evaluation.
        plain_rounds: of the memory update against the plain one.
        epoch_seconds: an epoch that would take longer is estimated from its steps, not run.
        plain_layers: time the plain memory update on at most so many layers, the last ones; None: on all.
    """

    rounds: int = 15
    repetitions: int = 5
    plain_rounds: int = 3
    epoch_seconds: float = 30
    plain_layers: int | None = None


FULL = Effort()
QUICK = Effort(rounds=3, repetitions=1, plain_rounds=1, epoch_seconds=0, plain_layers=2)
GPU_STEPS = 50  # of a measurement, at least: the wait at its end should not count


def measure(case: Case, stopwatch: Stopwatch, effort: Effort) -> dict[str, Any]:
    """Everything about one case, in plain values."""
    threads = torch.get_num_threads()
    try:
        tune(stopwatch.device, case.make_model(), case.options)
        task = case.task(stopwatch.device)
        rate = matrix_product_rate(stopwatch)
        steps = measure_steps(case, task, stopwatch, effort)
        flops = count_flops(case, task)
        images_per_second = measure_evaluation(case, task, stopwatch, effort)
        return {
            "title": case.title,
            "batch_size": case.options.batch_size_train,
            "threads": torch.get_num_threads() if stopwatch.device.type == "cpu" else None,
            "columns": {
                name: [k.shape[1], len(k)] for name, k in case.method(GPM, stopwatch.device).memory.bases.items()
            },
            "steps": steps,
            "floor": {"flops": flops, "flops_per_second": rate, "seconds": flops / rate},
            "memory": measure_memory(case, task, stopwatch, effort),
            "evaluation_images_per_second": images_per_second,
            "epoch": measure_epoch(case, task, stopwatch, effort, steps, images_per_second),
        }
    finally:
        torch.set_num_threads(threads)


def make(case: Case, kind: type[GPM], task: Task, step: str, stack: ExitStack, *, empty: bool = False) -> Steps:
    """The training steps of a task that `stack` keeps open."""
    case = dataclasses.replace(case, options=dataclasses.replace(case.options, step=step))
    method = case.method(kind, task.train.images.device, empty=empty)
    stack.enter_context(method.learning(T, task))
    return make_steps(method, method.optimizer(T, LR), T, task)


def measure_steps(case: Case, task: Task, stopwatch: Stopwatch, effort: Effort) -> dict[str, Any]:
    """Seconds of a step by form, alone and projected, and of the dense plain formula; ratios within each form."""
    batch = case.options.batch_size_train
    n_steps = max(case.steps, GPU_STEPS) if stopwatch.device.type == "cuda" else case.steps
    order = torch.arange(n_steps * batch, device=task.train.images.device) % case.pool
    with ExitStack() as stack:
        made: dict[str, dict[str, Steps]] = {}
        for step in ("auto", "eager"):
            alone = make(case, GPM, task, step, stack, empty=True)
            made[FORMS[type(alone)]] = {"alone": alone, "projected": make(case, GPM, task, step, stack)}
        made["eager"]["dense"] = make(case, plain.DenseGPM, task, "eager", stack)
        variants = {
            f"{form}/{variant}": (lambda steps=steps: steps.epoch(order))
            for form, of_form in made.items()
            for variant, steps in of_form.items()
        }
        interleaved(variants, 1, stopwatch)  # warm up; a CUDA graph is captured here
        times = interleaved(variants, effort.rounds, stopwatch)
    times = {name: [t / n_steps for t in values] for name, values in times.items()}
    return {
        form: {
            "seconds": {variant: asdict(Spread.of(times[f"{form}/{variant}"])) for variant in of_form},
            "ratio": {
                variant: asdict(ratios(times, f"{form}/{variant}", f"{form}/alone"))
                for variant in of_form
                if variant != "alone"
            },
        }
        for form, of_form in made.items()
    }


def count_flops(case: Case, task: Task) -> int:
    """Multiplications and additions of the matrix products and convolutions of a step without projection."""
    batch = case.options.batch_size_train
    with ExitStack() as stack:
        steps = make(case, GPM, task, "eager", stack, empty=True)
        with FlopCounterMode(display=False) as counter:
            steps.step(task.train.images[:batch], task.train.labels[:batch])
    return counter.get_total_flops()


def measure_memory(case: Case, task: Task, stopwatch: Stopwatch, effort: Effort) -> dict[str, Any]:
    """Seconds of a memory update of all layers: after the first task, after a later one, and the plain way.

    The ratio is that of the layers that were timed both ways.
    """
    ours = {}
    for name, empty in (("first", True), ("later", False)):
        method = case.method(GPM, stopwatch.device, empty=empty)
        bases = method.memory.bases

        def update(method=method, bases=bases) -> None:
            method.memory.bases = bases
            method.after_task(T, task)

        if effort.repetitions > 1:
            update()  # warm up
        ours[name] = asdict(Spread.of([stopwatch(update) for _ in range(effort.repetitions)]))

    method = case.method(GPM, stopwatch.device)
    names = list(method.memory.layers)[-(effort.plain_layers or 0) :]
    bases = method.memory.bases
    some = {name: method.memory.layers[name] for name in names}
    (images,), samples = method.representative(T, task.train)
    samples = {name: samples[name] for name in names if name in samples}
    thresholds = {name: method.thresholds[name] + case.options.threshold_step * T for name in names}

    def ours_on_these() -> None:
        method.memory.layers, method.memory.bases = some, {name: bases[name] for name in names}
        method.memory.update(lambda batch: method.model(batch, T), [images], thresholds, samples)

    numpy_bases = {name: bases[name].cpu().numpy().astype(np.float32) for name in names}
    variants = {
        "ours": ours_on_these,
        "plain": lambda: plain.update(
            method.model, lambda batch: method.model(batch, T), images, some, samples, numpy_bases, thresholds
        ),
    }
    times = interleaved(variants, effort.plain_rounds, stopwatch)
    return ours | {
        "plain": asdict(Spread.of(times["plain"])),
        "plain_layers": names if len(names) < len(method.thresholds) else "all",
        "ratio": asdict(ratios(times, "plain", "ours")),
    }


def measure_evaluation(case: Case, task: Task, stopwatch: Stopwatch, effort: Effort) -> float:
    """Images a second in eval mode, batches and metric included."""
    model = case.method(GPM, stopwatch.device).model
    times = [
        stopwatch(lambda: evaluate(model, T, task.test, case.options.batch_size_test))
        for _ in range(effort.repetitions + 1)
    ]
    return len(task.test.labels) / Spread.of(times[1:]).median


def measure_epoch(
    case: Case, task: Task, stopwatch: Stopwatch, effort: Effort, steps: dict[str, Any], images_per_second: float
) -> dict[str, Any]:
    """Seconds of an epoch of the real benchmark's size, validation included: with projected steps, and with dense ones.

    Args:
        steps: as measured one by one; what an epoch that would take too long is estimated from.
        images_per_second: in evaluation.
    """
    n_steps = -(-case.n_train // case.options.batch_size_train)
    fastest = next(iter(steps))  # what --step auto takes
    forms = {"projected": fastest, "dense": "eager"}
    seconds = {name: n_steps * steps[form]["seconds"][name]["median"] for name, form in forms.items()}
    measured = max(seconds.values()) <= effort.epoch_seconds
    if measured:
        order = torch.arange(case.n_train, device=task.train.images.device) % case.pool
        with ExitStack() as stack:
            made = {
                "projected": make(case, GPM, task, "auto", stack),
                "dense": make(case, plain.DenseGPM, task, "eager", stack),
            }
            variants = {name: (lambda steps=steps: steps.epoch(order)) for name, steps in made.items()}
            seconds = {name: times[0] for name, times in interleaved(variants, 1, stopwatch).items()}
    evaluation = case.n_valid / images_per_second
    return {
        "how": "measured" if measured else "estimated from its steps",
        "steps": n_steps,
        **{name: value + evaluation for name, value in seconds.items()},
    }
