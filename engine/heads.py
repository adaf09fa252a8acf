"""Which modules of a model belong to single tasks; all others are shared by every task."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from gradproj.errors import InputError

HOW_TO_SAY = "keep the heads in `heads`, an nn.ModuleList or nn.ModuleDict, or give the model a method task_modules(t)"


def task_modules(model: nn.Module, n_tasks: int) -> list[list[nn.Module]]:
    """The modules of each task, perhaps of fewer or more than n_tasks; empty where all tasks share all of the model.

    A model says so by a method `task_modules(t)`, which returns the modules of task t, or by an attribute `heads`: a
    ModuleList or ModuleDict with one for each task, in their order or under the keys "0", "1", … Where the model does
    not, the first of the modules inside that does counts, so that a model may be wrapped. A single module under
    `heads`, in a list or not, is shared by all tasks.

    Args:
        model: the network.
        n_tasks: of the run.
    Raises:
        InputError: torch cannot see the heads, or `task_modules(t)` does not return modules of the model.
    """
    for module in model.modules():
        if callable(said := getattr(module, "task_modules", None)):
            lists = _asked(said, model, n_tasks)
            return lists if any(lists) else []
        if (heads := _heads_of(module)) is not None:
            return [] if len(heads) == 1 < n_tasks else [[head] for head in heads]
    return []


def _heads_of(module: nn.Module) -> list[nn.Module] | None:
    """The modules under `heads`, in the order of the tasks; None where there is no list or dict of modules."""
    heads = getattr(module, "heads", None)
    if isinstance(heads, nn.ModuleDict):
        numbers = [str(t) for t in range(len(heads))]
        return [heads[key] for key in (numbers if set(heads) == set(numbers) else heads)] or None
    if isinstance(heads, nn.ModuleList):
        return list(heads) or None
    values = list(heads.values()) if isinstance(heads, dict) else heads
    if isinstance(values, (list, tuple)) and any(isinstance(value, nn.Module) for value in values):
        right = "nn.ModuleDict" if isinstance(heads, dict) else "nn.ModuleList"
        raise InputError(
            f"{type(module).__name__}.heads is a plain {type(heads).__name__}, whose modules torch neither trains nor "
            f"saves; make it an {right}"
        )
    return None


def _asked(said: Callable[[int], Any], model: nn.Module, n_tasks: int) -> list[list[nn.Module]]:
    """What `task_modules` says of the tasks of the run, and of later ones for which the model has room."""
    lists: list[list[nn.Module]] = []
    inside = {id(module) for module in model.modules()}
    known: set[int] = set()
    while True:
        t = len(lists)
        try:
            answer = said(t)
            answer = [answer] if isinstance(answer, nn.Module) else list(answer)
        except Exception as error:
            if t:  # it has no more
                return lists
            reason = f"fails ({type(error).__name__}: {error})"
            raise InputError(f"{type(model).__name__}.task_modules(0) {reason}; it must return modules") from error
        found = {id(module) for module in answer}
        if t >= n_tasks and (found <= known or not found <= inside):
            return lists
        if not found <= inside:
            raise InputError(
                f"{type(model).__name__}.task_modules({t}) must return modules of the model, one or a list"
            )
        known |= found
        lists.append(answer)
