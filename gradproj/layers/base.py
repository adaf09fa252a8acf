"""What a layer is to the rest of the library: rows [W, b] that act on columns, in one or more groups."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Layer:
    """A layer whose weights can be protected: its output is [W, b] times the columns of its input.

    A layer in groups is as many layers side by side, so it has one subspace for each group. A bias sees the constant 1
    as one more input.
    """

    name: str
    module: nn.Module

    @property
    def groups(self) -> int:
        return 1

    @property
    def input_size(self) -> int:
        """d: inputs that one output unit sees, a bias's constant 1 included."""
        return self.module.weight[0].numel() + (self.module.bias is not None)

    @property
    def keys(self) -> list[str]:
        """The names of the layer's subspaces: its own, or one for each group."""
        return [self.name] if self.groups == 1 else [f"{self.name}[{g}]" for g in range(self.groups)]

    @property
    def parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        """Weight and bias."""
        return self.module.weight, self.module.bias

    def rows(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Tensors of the shapes of weight and bias as one matrix [W, b] (o, d), group after group."""
        rows = weight.flatten(1)
        return rows if bias is None else torch.cat([rows, bias[:, None]], dim=1)

    def from_rows(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inverse of `rows`."""
        weight, bias = self.parameters
        if bias is None:
            return rows.view_as(weight), None
        return rows[:, :-1].reshape(weight.shape), rows[:, -1]

    def columns(self, inputs: Tensor) -> list[Tensor]:
        """The columns of the representation matrix that some inputs add: one (d, n) tensor a group.

        Args:
            inputs: what the layer's forward receives, batch first.
        """
        columns = self.weight_columns(inputs)
        if self.module.bias is not None:
            columns = [torch.cat([c, c.new_ones(1, c.shape[1])]) for c in columns]
        return columns

    def weight_columns(self, inputs: Tensor) -> list[Tensor]:
        """`columns` without the constant 1 of a bias."""
        raise NotImplementedError

    def positions(self, inputs: Tensor) -> int:
        """At most how many columns one sample of some inputs gives."""
        raise NotImplementedError

    def apply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's own forward with other parameters."""
        raise NotImplementedError
