"""Learning one task: epochs, schedule, best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

from engine.contract import check_optimizer
from engine.divergence import find_divergence, has_finite_weights
from engine.evaluation import evaluate
from engine.interrupts import deferred
from engine.method import Method
from engine.standing import Epoch, TaskProgress
from engine.steps import begin_rates, make_steps, seeded_order, set_learning_rate
from engine.task import Task
from gradproj.errors import DivergenceError


def train_task(
    method: Method, t: int, task: Task, progress: TaskProgress, on_epoch: Callable[[Epoch], None], began: float
) -> None:
    """Learn task t; with the plateau schedule the weights of the best validation loss are left in the model.

    Args:
        method: says how; it holds the model and the options.
        task: its tensors, on the model's device.
        progress: from `TaskProgress.beginning`, or where an interrupted run left off; kept up to date at every epoch
            boundary.
        on_epoch: called at every epoch boundary with the epoch's numbers.
        began: time.perf_counter() when the method was told of the task: the first epoch's time includes what it
            prepares.
    Raises:
        DivergenceError: a loss is infinite or NaN; `progress` is that of the boundary before.
    """
    model, options, schedule = method.model, method.options, progress.schedule
    plateau = options.schedule == "plateau"
    optimizer = method.optimizer(t, options.lr)
    check_optimizer(method, optimizer)
    begin_rates(optimizer)
    if progress.optimizer is not None:
        optimizer.load_state_dict(progress.optimizer)
    else:
        with deferred():
            progress.arrive(method, optimizer)
            progress.start = progress.weights
    steps, applied = make_steps(method, optimizer, t, task), progress.lr
    while progress.epoch < options.n_epochs and not (plateau and schedule.finished):
        lr, epoch = schedule.lr, progress.epoch
        method.lr = lr
        set_learning_rate(optimizer, lr, before=applied, start=options.lr)
        applied = lr
        train_loss = steps.epoch(seeded_order(method, t, epoch, task.train.labels))
        measure = partial(evaluate, model, t, batch_size=options.batch_size_test)
        valid_loss, valid_accuracy = measure(task.valid) if len(task.valid.labels) else (None, None)
        train_accuracy = measure(task.train)[1] if options.eval_train else None
        # Losses are of the weights before each step: the validation loss sees the last step's, if there is one.
        if not math.isfinite(train_loss + (valid_loss or 0)) or (valid_loss is None and not has_finite_weights(model)):
            raise DivergenceError(find_divergence(method, optimizer, t, task, progress))
        with deferred():
            progress.arrive(method, optimizer)
            progress.lr = lr
            if plateau and schedule.step(valid_loss):
                progress.best = progress.weights
            progress.epoch += 1
            seconds = time.perf_counter() - began
            on_epoch(Epoch(t, epoch + 1, lr, train_loss, train_accuracy, valid_loss, valid_accuracy, seconds))
        began = time.perf_counter()
    if progress.best is not None:
        method.load_weights(progress.best)
