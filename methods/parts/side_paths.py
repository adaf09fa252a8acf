"""Side paths: a layer computes with W + W B (Q - I) Bᵀ, changed inside a few directions, by thin products."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from engine import state
from engine.options import Options
from engine.task import Task
from gradproj.errors import InputError
from gradproj.layers import Layer
from gradproj.layers.convolution import ConvolutionLayer
from gradproj.layers.linear import LinearLayer
from methods.gpm import GPM


class SidePath(NamedTuple):
    """One term W B (Q - I) Bᵀ of a layer's weights [W, b] (o, d).

    Attributes:
        basis: B (d, k), orthonormal columns, in the weights' dtype.
        shift: Q - I (k, k).
        product: W B (o, k) where W's learning leaves it as it is; else None, and it is made anew at each step.
        open: P B (d, k), where W's gradient has its part through this path projected by P, at the price of a thin
            product; None where it has all of it.
    """

    basis: Tensor
    shift: Tensor
    product: Tensor | None = None
    open: Tensor | None = None

    def weights(self, rows: Tensor) -> Tensor:
        """W B (Q - I) Bᵀ (o, d), from the rows W (o, d)."""
        product = self.times_basis(rows) if self.product is None else self.product
        return product @ self.shift @ self.basis.T

    def times_basis(self, rows: Tensor) -> Tensor:
        """W B (o, k), whose gradient reaches W as `open` says."""
        if self.open is None:
            return rows @ self.basis
        return rows.detach() @ (self.basis - self.open) + rows @ self.open

    def outputs(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """What the path adds to a layer's outputs (n, o) on few inputs (n, d): thin products only."""
        inside = inputs @ self.basis @ self.shift.T  # (n, k)
        if self.product is not None:
            return inside @ self.product.T
        if self.open is None:
            return (inside @ self.basis.T) @ rows.T
        return (inside @ (self.basis - self.open).T) @ rows.detach().T + (inside @ self.open.T) @ rows.T


@contextmanager
def side_paths(layers: Mapping[str, Layer], paths: Mapping[str, Sequence[SidePath]]) -> Iterator[None]:
    """Within this context layers compute with W̃, the sum of W and the terms of their side paths.

    Args:
        layers: by name.
        paths: by key; a layer without any stays as it is.
    """
    with ExitStack() as stack:
        for layer in layers.values():
            groups = [paths.get(key, ()) for key in layer.keys]
            if not any(groups):
                continue
            if isinstance(layer, LinearLayer):
                hook = partial(add_outputs, layer, groups[0])
                stack.enter_context(layer.module.register_forward_hook(hook, with_kwargs=True))
            else:
                stack.enter_context(forward_on_changed_weights(layer, groups))
        yield


def add_outputs(
    layer: Layer,
    paths: Sequence[SidePath],
    _module: nn.Module,
    args: tuple[Tensor, ...],
    kwargs: dict[str, Any],
    output: Tensor,
) -> Tensor:
    """The output of a Linear and of its side paths: thin products of few inputs are cheaper than new weights."""
    inputs = args[0] if args else kwargs["input"]
    with torch._C.DisableTorchFunction():  # a protected weight is meant to be used here too: no reason to warn
        rows = layer.rows(*layer.parameters)  # [W, b]
        columns = layer.columns(inputs)[0].T.to(rows.dtype)  # (n, d)
        change = sum(path.outputs(columns, rows) for path in paths)  # (n, o)
        return output + change.view_as(output).to(output.dtype)


@contextmanager
def forward_on_changed_weights(layer: Layer, groups: Sequence[Sequence[SidePath]]) -> Iterator[None]:
    """Within this context a layer's forward runs on W̃, so that its inputs, of many positions, are gone through once.

    A protection entered in it finds W in its place, and projects what W̃ hands on to it; side paths use W itself.
    """
    module, parameters = layer.module, layer.parameters
    replaced, forward = vars(module).get("forward"), module.forward

    def terms() -> tuple[Tensor | None, Tensor | None]:
        parts = layer.rows(*parameters).chunk(layer.groups)
        rows = [
            sum((path.weights(part) for path in paths), torch.zeros_like(part))
            for part, paths in zip(parts, groups, strict=True)
        ]
        return layer.from_rows(torch.cat(rows))

    def changed_forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # a memory that gathers the layer's inputs looks where W itself is applied
            output = forward(*args, **kwargs)
            with torch._C.DisableTorchFunction():
                return output + layer.apply(*args, *kwargs.values(), *terms())
        before = {(owner, name): owner._parameters.get(name) for owner, name in layer.owners}
        with torch._C.DisableTorchFunction():  # as above
            for ((owner, name), current), term in zip(before.items(), terms(), strict=True):
                owner._parameters[name] = current if term is None else current + term
        try:
            return forward(*args, **kwargs)
        finally:
            for (owner, name), current in before.items():
                owner._parameters[name] = current

    module.forward = changed_forward
    try:
        yield
    finally:
        if replaced is None:
            del module.forward
        else:
            module.forward = replaced


class SidePathGPM(GPM):
    """GPM whose tasks compute with side paths of their own, learned beside the weights and kept.

    Attributes:
        shifts: by task, the Q - I of its side paths, in dicts.
    """

    plain_step, graph_step, task_identity, one_network, embeddings = False, True, True, False, False
    shifts: list[dict[str, Any]]

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        layers = self.memory.layers.items()
        others = [name for name, layer in layers if not isinstance(layer, (LinearLayer, ConvolutionLayer))]
        if others:
            raise InputError(f"{self.name} changes Linear layers and convolutions; not {', '.join(others)}")

    def side_paths(self, t: int) -> dict[str, list[SidePath]]:
        """Those of task t, by key."""
        raise NotImplementedError

    def parameters(self, t: int) -> list[nn.Parameter]:
        return [*super().parameters(t), *state.parameters(self.shifts[t])]

    @contextmanager
    def learning(self, t: int, task: Task) -> Iterator[None]:
        with self.testing(t), super().learning(t, task):
            yield

    @contextmanager
    def testing(self, t: int) -> Iterator[None]:
        with side_paths(self.memory.layers, self.side_paths(t)):
            yield
