"""Which modules of a model belong to single tasks; all others are shared by every task."""

from __future__ import annotations

from torch import nn

from gradproj.errors import InputError


def task_modules(model: nn.Module, n_tasks: int) -> list[list[nn.Module]]:
    """The modules of each task; empty where all tasks share all of the model.

    A model says so by a method `task_modules(t)`, which returns the modules of task t, or by an attribute `heads`: a
    ModuleList or ModuleDict with one for each task, in their order or under the keys "0", "1", … Both are also looked
    for in the modules inside, so that a model may be wrapped. A single module under `heads` is shared.

    Args:
        model: the network.
        n_tasks: how many tasks to ask `task_modules` for.
    Raises:
        InputError: `task_modules(t)` does not return modules.
    """
    for module in model.modules():
        if callable(said := getattr(module, "task_modules", None)):
            found = [said(t) for t in range(n_tasks)]
            lists = [[one] if isinstance(one, nn.Module) else list(one) for one in found]
            if not all(isinstance(one, nn.Module) for modules in lists for one in modules):
                raise InputError(f"{type(module).__name__}.task_modules(t) must return a module or a list of modules")
            return lists
        heads = getattr(module, "heads", None)
        if isinstance(heads, nn.ModuleDict):
            numbers = [str(t) for t in range(len(heads))]
            heads = [heads[key] for key in numbers] if set(heads) == set(numbers) else heads.values()
        elif not isinstance(heads, nn.ModuleList):
            continue
        return [[head] for head in heads]
    return []
