"""Where training left the finite numbers."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine.method import Method
from engine.standing import TaskProgress
from engine.steps import EagerSteps, seeded_order, set_learning_rate
from engine.task import Task


def has_finite_weights(model: nn.Module) -> bool:
    """Whether all of a model's parameters are finite."""
    return bool(torch.stack([p.isfinite().all() for p in model.parameters()]).all())


def find_divergence(
    method: Method, optimizer: torch.optim.Optimizer, t: int, task: Task, progress: TaskProgress
) -> str:
    """Replay the epoch after `progress` one step at a time; says where the numbers stopped being finite.

    Training itself watches only the epoch's mean loss, so that no step waits for the device.
    """
    model, lr = method.model, progress.schedule.lr
    progress.return_to_boundary(method, optimizer)
    set_learning_rate(optimizer, lr, before=progress.lr, start=method.options.lr)
    steps = EagerSteps(method, optimizer, t, task.train)
    first: list[str] = []  # what went first, of the values that a step makes
    count = 0

    def watch(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        if not first and isinstance(output, Tensor) and not output.isfinite().all():
            first.append(f"the outputs of layer {name}")

    def step(images: Tensor, labels: Tensor) -> Tensor:
        nonlocal count
        if first:
            return torch.zeros((), device=images.device)
        count += 1
        loss = steps.step(images, labels)
        if not first:
            first.extend(f"weights {name}" for name, p in model.named_parameters() if not p.isfinite().all())
        if not first and not loss.isfinite():
            first.append("the loss")
        return loss

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(partial(watch, name)))
        steps.walk(seeded_order(method, t, progress.epoch, task.train.labels), step)
    where = f"step {count}, {first[0]} went first" if first else "though not when taken one step at a time"
    place = f"task {t + 1}, epoch {progress.epoch + 1}, {where}"
    return f"the loss is no longer finite: {place}; lr was {lr:g}: try a lower one"
