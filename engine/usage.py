"""Which parameters a network uses for which task; one that the tasks would not train rightly is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from engine.heads import HOW_TO_SAY
from engine.method import Method
from engine.state import parameters
from gradproj.errors import InputError

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's wrapper, DataParallel or DistributedDataParallel."""
    while isinstance(model, WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, WRAPPERS) else model._orig_mod
    return model


@contextmanager
def on_trial(model: nn.Module) -> Iterator[nn.Module]:
    """A copy of a model to be called without a trace, in any mode, taken out of a wrapper for speed or many devices.

    One that cannot be copied is lent itself; its modes and buffers come back afterwards, as the random state does.
    """
    lent = unwrapped(model)
    with suppress(Exception):  # a weight that is computed from others, a lock: whatever the model's own copying raises
        lent = copy.deepcopy(lent)
    modes = {module: module.training for module in lent.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in lent.buffers()]
    devices = {p.device for p in lent.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        try:
            yield lent
        finally:
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for buffer, before in buffers:
                    if not torch.equal(buffer, before):  # one that was expanded cannot be written, nor does it move
                        buffer.copy_(before)


class Usage:
    """What a network uses for each task that it was asked for.

    Every parameter must be shared, of a task or frozen. One that only some tasks use belongs to these, and the model
    has to say so (engine/heads.py), or it would be trained, protected and left alone at the wrong times.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self.used: dict[int, set[str]] = {}  # by task, names of parameters
        names = {id(p): name for name, p in method.model.named_parameters()}
        self.names = [names[id(p)] for p in unwrapped(method.model).parameters()]
        self.own = {id(p) for p in parameters({name: getattr(method, name) for name in method.state})}

    def ask(self, lent: nn.Module, t: int, images: Tensor) -> None:
        """See what the network uses for task t, in training and in eval mode.

        Args:
            lent: the network, from `on_trial`.
            t: the task.
            images: a few.
        Raises:
            InputError: it uses a weight that is none of its parameters.
            Exception: whatever the network raises on the images.
        """
        parameters = list(lent.parameters())
        if len(parameters) != len(self.names):
            raise InputError(
                f"the network has {len(parameters)} parameters, {len(self.names)} when the run began; parameters of a "
                "method's own stand in its state, not in the network"
            )
        names = dict(zip(map(id, parameters), self.names, strict=True))
        found: set[str] = set()
        for mode in (True, False):
            lent.train(mode)
            with torch.enable_grad():
                outputs = lent(images.clone(), t)
            leaves = leaf_tensors(outputs) if isinstance(outputs, Tensor) else []
            if leaves is None:
                found |= names.values()
                continue
            for leaf in leaves:
                if id(leaf) in names:
                    found.add(names[id(leaf)])
                elif leaf.requires_grad and id(leaf) not in self.own:
                    raise InputError(
                        f"{type(lent).__name__} uses a weight {tuple(leaf.shape)} that is none of its parameters, so "
                        "it would not be trained; keep its module in an nn.ModuleList or nn.ModuleDict"
                    )
        self.used[t] = found

    def check(self) -> None:
        """Raise InputError, naming a parameter, where the tasks asked so far would not train it rightly."""
        model = self.method.model
        owners: dict[int, set[int]] = {}
        for t, modules in enumerate(self.method.task_modules):
            for p in (p for module in modules for p in module.parameters()):
                owners.setdefault(id(p), set()).add(t)
        for name, p in model.named_parameters():
            if name in self.method.given and p.requires_grad and (wrong := self._fault(name, owners.get(id(p), set()))):
                raise InputError(f"{type(model).__name__}: {wrong}")

    def _fault(self, name: str, owners: set[int]) -> str:
        """What is wrong with how the tasks use a parameter; empty if nothing is."""
        asked = set(self.used)
        users = {t for t in asked if name in self.used[t]}
        if not owners:
            if users == asked:
                return ""
            if users:
                which = f"{in_words(users)} {'uses' if len(users) == 1 else 'use'} {name}"
                return f"only {which}, but the model does not say that it belongs to a task: {HOW_TO_SAY}"
            if len(asked) < self.method.options.n_tasks:
                return ""
            return f"no task trains {name}, since none uses it; freeze it (requires_grad_(False)) or take it out"
        if len(owners) > 1 and not self.method.joint:
            return (
                f"{name} belongs to {in_words(owners)}, so that the later ones would change it unprotected; leave what "
                "all tasks share out of the heads, and give others a head for each task"
            )
        if owners & asked and not owners & users:
            return f"{name} is said to belong to {in_words(owners & asked)}, which does not use it: {HOW_TO_SAY}"
        for t in sorted(users - owners):
            # Later tasks may build on what earlier ones have learned, if they learn something of their own.
            if t < min(owners) or not self._has_own(t):
                return (
                    f"{in_words({t})} uses {name}, which is said to belong to {in_words(owners)} and so is not trained "
                    f"on it: {HOW_TO_SAY}, [] where it has none"
                )
        return ""

    def _has_own(self, t: int) -> bool:
        modules = self.method.task_modules[t] if t < len(self.method.task_modules) else []
        own = {id(p) for module in modules for p in module.parameters()}
        return any(id(p) in own and name in self.used[t] for name, p in self.method.model.named_parameters())


def in_words(tasks: set[int]) -> str:
    """Numbers of tasks, for people."""
    return f"task{'s' * (len(tasks) > 1)} {', '.join(str(t + 1) for t in sorted(tasks))}"


def leaf_tensors(outputs: Tensor) -> list[Tensor] | None:
    """The leaves that a gradient of some outputs would reach, from the autograd graph; None where it does not show all.

    Reentrant checkpointing builds its part of the graph only in backward.
    """
    nodes, visited, leaves = [outputs.grad_fn], {None}, []
    while nodes:
        node = nodes.pop()
        if node in visited:
            continue
        visited.add(node)
        if type(node).__name__ == "CheckpointFunctionBackward":
            return None
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.append(leaf)
        nodes += [before for before, _ in node.next_functions]
    return leaves
