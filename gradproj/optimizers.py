"""Updates orthogonal to the bases, for optimisers whose step is not a combination of this task's gradients."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from gradproj.errors import InputError
from gradproj.projection import LayerProjector, size

STEP = ("lr", "momentum", "dampening", "nesterov", "maximize")  # what makes of gradients the step of SGD


def unwrapped(optimizers: Any) -> list[torch.optim.Optimizer]:
    """The torch optimisers that one or some optimisers are, inside the wrappers of other libraries.

    Their hooks see each step, also one that a wrapper takes.

    Raises:
        InputError: there is none.
    """
    given = list(optimizers) if isinstance(optimizers, Iterable) else [optimizers]
    return [_innermost(optimizer) for optimizer in given]


def trainers(optimizers: Any, model: nn.Module) -> list[torch.optim.Optimizer]:
    """The torch optimisers that one or some optimisers are; raises InputError where none of them trains a model."""
    found, mine = unwrapped(optimizers), {id(p) for p in model.parameters()}
    if not any(id(p) in mine for inner in found for group in inner.param_groups for p in group["params"]):
        raise InputError(
            "optimizer holds no parameter of the model, so its steps cannot be projected; give the one that trains it"
        )
    return found


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    inner = found = optimizer
    while inner is not None:
        found = inner
        inner = next((v for v in getattr(inner, "__dict__", {}).values() if isinstance(v, torch.optim.Optimizer)), None)
    if not isinstance(found, torch.optim.Optimizer):
        raise InputError(f"optimizer is a {type(optimizer).__name__}; it must be a torch.optim.Optimizer, or wrap one")
    return found


def leaves_gradients(optimizer: torch.optim.Optimizer, projectors: Iterable[LayerProjector]) -> str | None:
    """Why an optimiser's steps are no combination of projected gradients; None if they are.

    Args:
        optimizer: before its first step.
        projectors: of the layers that matter.
    """
    if type(optimizer) is not torch.optim.SGD:
        return f"{type(optimizer).__name__} rescales or adds to gradients"
    busy = [project for project in projectors if not project.is_idle]
    wanted = {id(p) for project in busy for p in project.layer.parameters if p is not None}
    if any(group["weight_decay"] and any(id(p) in wanted for p in group["params"]) for group in optimizer.param_groups):
        return "weight decay adds the weights to gradients"
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for project in busy:
        groups = [group_of.get(id(p)) for p in project.layer.parameters if p is not None]
        steps = [None if g is None else tuple(float(g[name]) for name in STEP) for g in groups]
        if any(step != steps[0] for step in steps):
            return f"weight and bias of {project.layer.name or 'the model'} take different steps"
    for project in busy:  # momentum of a task that goes on has been projected
        parameters = project.layer.parameters
        kept = [None if p is None else optimizer.state.get(p, {}).get("momentum_buffer") for p in parameters]
        if came_past(project, with_zeros(parameters, kept)):
            return "momentum was kept from before"
    return None


def with_zeros(parameters: Sequence[Tensor | None], given: Sequence[Tensor | None]) -> list[Tensor | None] | None:
    """Tensors for a layer's parameters with zeros where one has none; None where none has one."""
    if all(g is None for g in given):
        return None
    return [
        None if p is None else torch.zeros_like(p) if g is None else g for p, g in zip(parameters, given, strict=True)
    ]


@torch.no_grad()
def came_past(project: LayerProjector, given: Sequence[Tensor | None] | None) -> bool:
    """Whether a projector would remove more of some tensors than what rounding leaves in projected ones.

    That is small against what a gradient was before its projection, not against what it is afterwards; and what is less
    than the rounding of the weights does not move them.
    """
    if given is None:
        return False
    present = [g for g in given if g is not None]
    removed = size([g - p for g, p in zip(present, (p for p in project(*given) if p is not None), strict=True)])
    before = 0.0 if project.first_size is None else float(project.first_size)
    eps = torch.finfo(project.layer.dtype).eps
    weights = size([p for p in project.layer.parameters if p is not None])
    return removed > max(max(1e-3, 10 * eps) * max(before, size(present)), eps * weights)


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

    @torch.no_grad()
    def remember(*_: Any) -> None:
        if not before:  # the same memory for every step
            before[:] = [[None if p is None else torch.empty_like(p) for p in each.layer.parameters] for each in busy]
        for each, old in zip(busy, before, strict=True):
            for p, o in zip(each.layer.parameters, old, strict=True):
                if p is not None and o is not None:
                    o.copy_(p)

    @torch.no_grad()
    def project(*_: Any) -> None:
        for each, old in zip(busy, before, strict=True):
            now = each.layer.parameters
            moved = each(*(None if p is None or o is None else p - o for p, o in zip(now, old, strict=True)))
            for parameter, start, step in zip(now, old, moved, strict=True):
                if parameter is not None and start is not None and step is not None:
                    torch.add(start, step, out=parameter.detach())

    first, last = map(torch.compiler.disable, (remember, project))  # a compiled step calls them as they are
    with optimizer.register_step_pre_hook(first), optimizer.register_step_post_hook(last):
        yield


def unprojected(projectors: Iterable[LayerProjector]) -> list[str]:
    """The names of layers whose gradients came past their projectors."""
    busy = [project for project in projectors if not project.is_idle]
    return [project.layer.name for project in busy if came_past(project, gradients(project))]


def gradients(project: LayerProjector) -> list[Tensor | None] | None:
    """What a layer's parameters hold of a gradient, zeros where only one has any; None where neither has."""
    parameters = project.layer.parameters
    return with_zeros(parameters, [None if p is None else p.grad for p in parameters])


@contextmanager
def watched_steps(
    parameters: Container[int],
    first: Callable[[torch.optim.Optimizer, bool], None],
    each: Callable[[], None],
) -> Iterator[None]:
    """Within this context the steps of every optimiser of some parameters are seen, before they are taken.

    Args:
        parameters: their ids.
        first: called before the first step of an optimiser with it, and whether the step makes gradients itself.
        each: called before each step.
    """
    seen: set[int] = set()

    def look(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not any(id(p) in parameters for group in optimizer.param_groups for p in group["params"]):
            return
        each()
        if id(optimizer) not in seen:
            seen.add(id(optimizer))
            closure = [*args[1:], *kwargs.values()]  # after the optimiser itself
            first(optimizer, any(value is not None for value in closure))

    handle = register_optimizer_step_pre_hook(torch.compiler.disable(look))
    try:
        yield
    finally:
        handle.remove()
