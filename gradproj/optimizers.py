"""Updates orthogonal to the bases, for optimisers whose step is not a combination of this task's gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradproj.errors import InputError
from gradproj.projection import LayerProjector, full_float32


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimiser inside the wrappers of other libraries, whose hooks see each step.

    Raises:
        InputError: there is none.
    """
    inner = optimizer
    while isinstance(getattr(inner, "optimizer", None), torch.optim.Optimizer):
        inner = inner.optimizer
    if not isinstance(inner, torch.optim.Optimizer):
        raise InputError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer, or wrap one")
    return inner


def leaves_gradients(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> str | None:
    """Why an optimiser's steps are no combination of this task's gradients; None if they are.

    Args:
        optimizer: before its first step within the task.
        parameters: those that matter.
    """
    if type(optimizer) is not torch.optim.SGD:
        return f"{type(optimizer).__name__} rescales or adds to gradients"
    wanted = {id(p) for p in parameters}
    for group in optimizer.param_groups:
        if any(id(p) in wanted for p in group["params"]):
            if group["weight_decay"]:
                return "weight decay adds the weights to gradients"
            if any(optimizer.state.get(p, {}).get("momentum_buffer") is not None for p in group["params"]):
                return "momentum was kept from before"
    return None


@contextmanager
def projected_updates(optimizer: torch.optim.Optimizer, projectors: Mapping[str, LayerProjector]) -> Iterator[None]:
    """Within this context every `optimizer.step()` moves the layers' weights orthogonally to their bases.

    Args:
        optimizer: of any kind; what it does to a weight is projected afterwards, W ← W₀ + (W - W₀) P.
        projectors: by layer name.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    busy = [
        project
        for project in projectors.values()
        if not project.is_idle and any(id(p) in held for p in project.layer.parameters if p is not None)
    ]
    before: list[list[Tensor | None]] = []

    def remember(*_: Any) -> None:
        before[:] = [[None if p is None else p.detach().clone() for p in each.layer.parameters] for each in busy]

    @torch.no_grad()
    def project(*_: Any) -> None:
        for each, old in zip(busy, before, strict=True):
            now = each.layer.parameters
            changes = [None if p is None else p - o for p, o in zip(now, old, strict=True)]
            with full_float32(next(change for change in changes if change is not None)):
                moved = each(*changes)
            for parameter, start, step in zip(now, old, moved, strict=True):
                if parameter is not None:
                    torch.add(start, step, out=parameter.detach())

    with optimizer.register_step_pre_hook(remember), optimizer.register_step_post_hook(project):
        yield


@contextmanager
def watched_steps(
    parameters: Mapping[int, nn.Parameter],
    known: Callable[[], Iterable[int]],
    say: Callable[[str, str], None],
    count: Callable[[], None],
) -> Iterator[None]:
    """Within this context the steps of every optimiser of some parameters are seen.

    Args:
        parameters: by id.
        known: the ids of optimisers whose updates are projected.
        say: called with the name of an optimiser that needs that and lacks it at its first step, and why.
        count: called at each step.
    """
    seen: set[int] = set()

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        mine = [p for group in optimizer.param_groups for p in group["params"] if id(p) in parameters]
        if mine:
            count()
        if id(optimizer) in seen:
            return
        seen.add(id(optimizer))
        if mine and id(optimizer) not in set(known()) and (reason := leaves_gradients(optimizer, mine)):
            say(type(optimizer).__name__, reason)

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
