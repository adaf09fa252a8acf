"""Convolutions: every patch of an input is a column."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from gradproj.layers.base import Layer


class ConvolutionLayer(Layer):
    """y = W x + b on the patches x of images (batch, channels, *size)."""

    modules = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    @property
    def groups(self) -> int:
        return self.module.groups

    def weight_columns(self, inputs: Tensor) -> list[Tensor]:
        return list(patches(self.module, inputs))

    def positions(self, inputs: Tensor) -> int:
        return inputs[0, 0].numel()  # at stride 1

    def apply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self.module._conv_forward(inputs, weight, bias)


def patches(conv: nn.Module, inputs: Tensor) -> Tensor:
    """The patches of `inputs` (batch, channels, *size) that a convolution sees, as (groups, d, batch · positions)."""
    padding = conv._reversed_padding_repeated_twice  # also resolves padding="same"
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(inputs, padding, mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(axis + 2, dilation * (size - 1) + 1, stride)[..., ::dilation]
    batch, channels = x.shape[:2]
    dims = len(conv.kernel_size)
    x = x.reshape(batch, conv.groups, channels // conv.groups, -1, *conv.kernel_size)  # (b, g, c, positions, *kernel)
    order = (1, 2, *range(4, 4 + dims), 0, 3)  # (g, c, *kernel, b, positions)
    return x.permute(order).reshape(conv.groups, x[0, 0, :, 0].numel(), -1)
