"""Side paths: a layer computes with W + W B (Q - I) Bᵀ, changed inside a few directions, by thin products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine import state
from engine.options import Options
from engine.task import Task
from gradproj.layers import Layer
from gradproj.layers.convolution import ConvolutionLayer, TransposedConvolutionLayer
from gradproj.layers.linear import LinearLayer, TransposedLinearLayer
from methods.gpm import GPM
from methods.parts.modules import refuse_other_kinds, refuse_other_uses


class SidePath(NamedTuple):
    """One term W B (Q - I) Bᵀ of a layer's weights [W, b] (o, d).

    Attributes:
        basis: B (d, k), orthonormal columns, in the weights' dtype.
        shift: Q - I (k, k).
    """

    basis: Tensor
    shift: Tensor


@contextmanager
def side_paths(layers: Mapping[str, Layer], paths: Mapping[str, Sequence[SidePath]]) -> Iterator[None]:
    """Within this context layers compute with W̃, the sum of W and the terms of their side paths.

    A protection entered in it projects all that W gets, through the side paths too.

    Args:
        layers: by name.
        paths: by key; a layer without any stays as it is.
    """
    with ExitStack() as stack:
        for layer in layers.values():
            groups = [paths.get(key, ()) for key in layer.keys]
            if not any(groups):
                continue
            module = layer.module
            if type(module).forward is nn.Linear.forward and layer.trained == (True, False):
                before, after = partial(change_inputs, groups[0]), partial(add_outputs, groups[0])
                stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                stack.enter_context(module.register_forward_hook(after, with_kwargs=True))
            else:
                stack.enter_context(forward_on_changed_weights(layer, groups))
        yield


def inside(inputs: Tensor, paths: Sequence[SidePath]) -> Tensor:
    """What W̃ x = W (x + Σ B (Q - I) Bᵀ x) adds to inputs (…, d)."""
    parts = [inputs @ path.basis @ path.shift.T @ path.basis.T for path in paths]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def change_inputs(paths: Sequence[SidePath], _module: nn.Module, args: Any, kwargs: Any) -> Any:
    (inputs,) = (*args, *kwargs.values())
    return ((inputs + inside(inputs, paths) if torch.is_grad_enabled() else inputs),), {}


def add_outputs(paths: Sequence[SidePath], module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """Without gradients a memory may look at what W is applied to, which are the inputs as they are."""
    if torch.is_grad_enabled():
        return output
    with torch._C.DisableTorchFunction():
        return output + F.linear(inside(*args, *kwargs.values(), paths), module.weight)


@contextmanager
def forward_on_changed_weights(layer: Layer, groups: Sequence[Sequence[SidePath]]) -> Iterator[None]:
    """Within this context a layer's forward runs on W̃, made of what stands in W's place."""
    replaced, forward = vars(layer.module).get("forward"), layer.module.forward

    def terms() -> tuple[Tensor | None, Tensor | None]:
        parts = layer.rows(*layer.parameters).chunk(layer.groups)
        pairs = zip(parts, groups, strict=True)
        sums = [sum((W @ B @ D @ B.T for B, D in paths), torch.zeros_like(W)) for W, paths in pairs]
        return layer.from_rows(torch.cat(sums))

    def changed_forward(*args: Any, **kwargs: Any) -> Any:
        watched = not torch.is_grad_enabled() and torch._C._len_torch_function_stack()
        if watched:  # a memory that gathers the layer's inputs looks where W itself is applied
            forward(*args, **kwargs)
        before = [(owner, name, owner._parameters.get(name)) for owner, name in layer.owners]
        with torch._C.DisableTorchFunction():  # a protected weight is meant to be used here: no reason to warn
            for (owner, name, current), term in zip(before, terms(), strict=True):
                owner._parameters[name] = current if term is None else current + term  # in the layout of W
        try:
            return forward(*args, **kwargs)
        finally:
            for owner, name, current in before:
                owner._parameters[name] = current

    layer.module.forward = changed_forward
    try:
        yield
    finally:
        if replaced is None:
            del layer.module.forward
        else:
            layer.module.forward = replaced


class SidePathGPM(GPM):
    """GPM whose tasks compute with side paths of their own, learned beside the weights and kept.

    Attributes:
        shifts: by task, the Q - I of its side paths, in dicts.
    """

    plain_step, graph_step, task_identity, one_network = False, True, True, False
    learns_when_full = True
    shifts: list[dict[str, Any]]

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        kinds = (LinearLayer, TransposedLinearLayer, ConvolutionLayer, TransposedConvolutionLayer)
        refuse_other_kinds(self.name, self.memory.layers, kinds)

    def side_paths(self, t: int) -> dict[str, list[SidePath]]:
        """Those of task t, by key."""
        raise NotImplementedError

    def parameters(self, t: int) -> list[nn.Parameter]:
        return [*super().parameters(t), *state.parameters(self.shifts[t])]

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        if t == 0:
            refuse_other_uses(self.name, self.model, self.memory.layers, lambda: self.model(task.train.images[:2], t))
        with self.testing(t), super().learning(t, task):
            yield

    @contextmanager
    def testing(self, t: int) -> Iterator[None]:
        with side_paths(self.memory.layers, self.side_paths(t)):
            yield
