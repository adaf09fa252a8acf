"""Projection by degrees: gradients lose a share λ_i, not all, of what they have along each direction of a basis."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

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


def _projector(basis: Tensor, scale: Tensor, dtype: torch.dtype) -> Projector:
    """I - M diag(λ) Mᵀ is I - F Fᵀ with F = M diag(√λ)."""
    route = cheapest_route(*basis.shape)
    if route in ("keep", "zero"):  # what λ < 1 leaves of M is in neither
        route = "dense"
    return orthogonal_projector(basis * scale.to(basis).sqrt(), dtype, route)
