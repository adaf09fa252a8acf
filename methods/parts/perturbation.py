"""Gradients at other weights than those that learn: a little uphill, where a sharp minimum shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def computing_with(model: nn.Module, weights: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Within this context a model computes with some tensors in the place of its parameters.

    A tensor that was made from its parameter, p + e, hands its gradient on to it.
    """
    places = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p in weights]
    for module, name, p in places:
        module._parameters[name] = weights[p]
    try:
        yield
    finally:
        for module, name, p in places:
            module._parameters[name] = p


def of_length(gradients: Sequence[Tensor | None], length: float) -> list[Tensor | None]:
    """ρ g / ‖g‖, the norm over all tensors together; zero where g is."""
    there = [g for g in gradients if g is not None]
    norm = torch.stack([g.norm() for g in there]).norm()
    factor = length / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    return [None if g is None else factor * g for g in gradients]
