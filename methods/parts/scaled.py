"""Projection by degrees: gradients lose a share λ_i, not all, of what they have along each direction of a basis."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradproj.layers import Layer
from gradproj.layers.linear import LinearLayer
from gradproj.optimizers import with_zeros
from gradproj.projection import (
    LayerProjector,
    Projector,
    cheapest_route,
    full_float32,
    orthogonal_projector,
    product_dtype,
)


def scaled_projector(layer: Layer, bases: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> LayerProjector:
    """What a layer's gradient goes through for G ← G - G M diag(λ) Mᵀ.

    Args:
        layer: whose gradient.
        bases: M (d, k) with orthonormal columns, by key.
        scales: λ (k,) in [0, 1], by key.
    """
    dtype = product_dtype(layer.dtype)
    return LayerProjector(layer, [_projector(bases[key].to(layer.device), scales[key], dtype) for key in layer.keys])


def _projector(basis: Tensor, scale: Tensor, dtype: torch.dtype) -> Projector:
    """I - M diag(λ) Mᵀ is I - F Fᵀ with F = M diag(√λ)."""
    route = cheapest_route(*basis.shape)
    if route in ("keep", "zero"):  # what λ < 1 leaves of M is in neither
        route = "dense"
    return orthogonal_projector(basis * scale.to(basis).sqrt(), dtype, route)


class Scaled(NamedTuple):
    """G ↦ G M diag(λ) Mᵀ, which can be differentiated by λ.

    Attributes:
        bases: M (d, k) in the gradients' dtype, by key.
        scales: λ (k,), by key.
    """

    bases: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]

    def rows(self, key: str, rows: Tensor) -> Tensor:
        """(n, d) to (n, d)."""
        with full_float32(rows):
            return ((rows @ self.bases[key]) * self.scales[key]) @ self.bases[key].T

    def gradients(
        self, layers: Iterable[Layer], gradients: Mapping[nn.Parameter, Tensor | None]
    ) -> dict[nn.Parameter, Tensor]:
        """Of the parameters of those layers that have gradients, by parameter."""
        parts: dict[nn.Parameter | None, Tensor | None] = {}
        for layer in layers:
            own = with_zeros(layer.parameters, [None if p is None else gradients.get(p) for p in layer.parameters])
            if own is not None:
                rows = torch.cat([self.rows(key, G) for key, G in layer.rows_by_key(*own).items()])
                parts |= zip(layer.parameters, layer.from_rows(rows), strict=True)
        return {p: part for p, part in parts.items() if p is not None}

    def of_call(self, call: Call, deltas: Tensor) -> dict[nn.Parameter, Tensor]:
        """The same of a call's G = Δᵀ X: n rows of X go through it instead of o rows of G.

        Args:
            call: of a Linear.
            deltas: Δ, the gradient by its outputs.
        """
        layer, inputs = call.layer, call.inputs
        rows = self.rows(layer.name, layer.columns(inputs)[0].T.to(layer.dtype))
        with full_float32(rows):
            G = deltas.reshape(len(rows), -1).to(layer.dtype).T @ rows
        pairs = zip(layer.parameters, layer.from_rows(G), strict=True)
        return {p: part for p, part in pairs if p is not None and part is not None}


class Call(NamedTuple):
    """One call of a Linear: its inputs, and zeros that were added to its outputs, to be differentiated by."""

    layer: Layer
    inputs: Tensor
    zeros: Tensor


@contextmanager
def calls_of_few_rows(layers: Iterable[Layer]) -> Iterator[list[Call]]:
    """Within this context those calls of Linear layers are written down whose inputs have fewer rows than the weight.

    When it ends, only those are left that are their layer's single call.
    """
    calls: list[Call] = []
    n_calls: dict[str, int] = {}

    def hook(layer: Layer, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        n_calls[layer.name] = n_calls.get(layer.name, 0) + 1
        if not args or args[0].numel() >= layer.all_parameters[0].numel():
            return output
        calls.append(Call(layer, args[0], torch.zeros_like(output, requires_grad=True)))
        return output + calls[-1].zeros

    with ExitStack() as hooks:
        for layer in layers:
            if type(layer) is LinearLayer:
                hooks.enter_context(layer.module.register_forward_hook(partial(hook, layer)))
        yield calls
    calls[:] = [call for call in calls if n_calls[call.layer.name] == 1]
