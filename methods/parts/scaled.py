"""Projection by degrees: gradients lose a share λ_i, not all, of what they have along each direction of a basis."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from gradproj.layers import Layer
from gradproj.projection import LayerProjector, Projector, cheapest_route, orthogonal_projector


def scaled_projector(layer: Layer, bases: Mapping[str, Tensor], scales: Mapping[str, Tensor]) -> LayerProjector:
    """What a layer's gradient goes through for G ← G - G M diag(λ) Mᵀ.

    Args:
        layer: whose gradient.
        bases: M (d, k) with orthonormal columns, by key.
        scales: λ (k,) in [0, 1], by key.
    """
    weight = layer.module.weight
    return LayerProjector(
        layer, [_projector(bases[key].to(weight.device), scales[key], weight.dtype) for key in layer.keys]
    )


def scaled_parts(
    layers: Iterable[Layer],
    gradients: Mapping[nn.Parameter, Tensor | None],
    bases: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
) -> dict[nn.Parameter, Tensor]:
    """G M diag(λ) Mᵀ of the parameters of those layers that have gradients.

    Args:
        layers: all of whose keys have bases and scales.
        gradients: by parameter.
        bases: M (d, k) in the gradients' dtype, by key.
        scales: λ (k,), by key.
    """
    parts: dict[nn.Parameter | None, Tensor | None] = {}
    for layer in layers:
        weight, bias = layer.parameters
        if gradients.get(weight) is not None:
            rows = layer.rows(gradients[weight], None if bias is None else gradients[bias]).chunk(layer.groups)
            pairs = zip(layer.keys, rows, strict=True)
            held = [((G @ bases[key]) * scales[key]) @ bases[key].T for key, G in pairs]
            parts |= zip(layer.parameters, layer.from_rows(torch.cat(held)), strict=True)
    return {p: part for p, part in parts.items() if p is not None}


def _projector(basis: Tensor, scale: Tensor, dtype: torch.dtype) -> Projector:
    """I - M diag(λ) Mᵀ is I - F Fᵀ with F = M diag(√λ)."""
    route = cheapest_route(*basis.shape)
    if route in ("keep", "zero"):  # what λ < 1 leaves of M is in neither
        route = "dense"
    return orthogonal_projector(basis * scale.to(basis).sqrt(), dtype, route)
