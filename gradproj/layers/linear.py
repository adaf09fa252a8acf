"""Linear layers: every position of an input is a column."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gradproj.layers.base import Layer


class LinearLayer(Layer):
    """y = W x + b on rows x (..., d)."""

    modules = (nn.Linear,)

    def weight_columns(self, inputs: Tensor) -> list[Tensor]:
        return [inputs.reshape(-1, inputs.shape[-1]).T]

    def positions(self, inputs: Tensor) -> int:
        return inputs[0, ..., 0].numel()

    def apply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(inputs, weight, bias)
