"""A network as it was when a memory last remembered it, and the difference to what it is now."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradproj.distributed import checksum
from gradproj.layers import Layer


@dataclass
class Snapshot:
    """What could move of a network, as it was, and whether the rest is still the same.

    Attributes:
        values: on the CPU, of all parameters that are trained or protected, and of all buffers, by name.
        checksums: of all other parameters, by name.
        steps: that optimisers have taken since.
    """

    values: dict[str, Tensor]
    checksums: dict[str, int]
    steps: int = 0

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, layers: Iterable[Layer]) -> Snapshot:
        """A model as it is now, with these layers protected."""
        protected = {id(p) for layer in layers for p in layer.parameters}
        moving: dict[str, Tensor] = {}
        still: dict[str, Tensor] = {}
        for name, p in model.named_parameters():
            (moving if p.requires_grad or id(p) in protected else still)[name] = p
        return cls(
            {name: value.to("cpu", copy=True) for name, value in (*moving.items(), *model.named_buffers())},
            {name: checksum(p) for name, p in still.items() if not p.is_meta},
        )

    def resized(self, model: nn.Module) -> list[str]:
        """The names of what has another shape now."""
        now = current(model)
        return [name for name, value in self.values.items() if name in now and now[name].shape != value.shape]


def current(model: nn.Module) -> dict[str, Tensor]:
    """A model's parameters and buffers by name."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The names of a model's parameters, by their ids."""
    return {id(p): name for name, p in model.named_parameters()}


def difference(
    layer: Layer, names: Mapping[int, str], now: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> list[Tensor | None]:
    """ΔW and Δb of a layer, where `now` is; None for one that is not trained.

    Args:
        layer: whose parameters.
        names: of the model's parameters, by id.
        now, before: values of the model's parameters, by name.
    """
    own = [None if p is None else names[id(p)] for p in layer.parameters]
    return [None if name is None else now[name] - before[name].to(now[name]) for name in own]
