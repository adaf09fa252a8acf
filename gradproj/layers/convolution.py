"""Convolutions: every patch of an input is a column; of a transposed one, every patch of the input spread by zeros."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from gradproj.layers.base import Call, Layer

PLAIN = Call(("input", "weight", "bias", "stride", "padding", "dilation", "groups"))
TRANSPOSED = Call(("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation"))


class ConvolutionLayer(Layer):
    """y = W x + b on the patches x of images (batch, channels, *size), also without the batch axis."""

    kind = "convolution"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    functions = {F.conv1d: PLAIN, F.conv2d: PLAIN, F.conv3d: PLAIN}

    @property
    def groups(self) -> int:
        return self.module.groups

    @property
    def axes(self) -> int:
        """Axes of an image."""
        return self.all_parameters[0].ndim - 2

    def understands(self, arguments: Mapping[str, Any]) -> bool:
        return arguments.get("groups", 1) == self.groups

    def signature(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        geometry = tuple(repr(arguments.get(name)) for name in ("stride", "padding", "output_padding", "dilation"))
        return (*super().signature(function, arguments), self.groups, *self.all_parameters[0].shape[2:], *geometry)

    def module_call(self, inputs: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        conv = self.module
        settings = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        if conv.padding_mode != "zeros":
            inputs = F.pad(inputs, conv._reversed_padding_repeated_twice, mode=conv.padding_mode)
            settings["padding"] = 0
        return inputs, settings

    def weight_columns(self, inputs: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
        kernel = tuple(self.all_parameters[0].shape[2:])
        stride, dilation = (_each(arguments.get(name, 1), self.axes) for name in ("stride", "dilation"))
        padded = pad(inputs, arguments.get("padding", 0), kernel, dilation)
        return list(patches(padded, kernel, stride, dilation, self.groups))

    def batched(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.ndim == self.axes + 2 else inputs[None]

    def positions(self, inputs: Tensor) -> int:
        return inputs[:1, :1].numel()  # at stride 1

    def position_axes(self, inputs: Tensor) -> int:
        return 1


class TransposedConvolutionLayer(ConvolutionLayer):
    """A transposed convolution is a plain one, of the turned kernel, over the input with zeros between its entries.

    Its columns are the patches of that spread input, d = channels / groups · kernel size. (The span of the raw input
    vectors, which each kernel position multiplies, would have channels / groups directions only and fill at once.)
    """

    kind = "transposed convolution"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    functions = {F.conv_transpose1d: TRANSPOSED, F.conv_transpose2d: TRANSPOSED, F.conv_transpose3d: TRANSPOSED}

    @property
    def weight_size(self) -> int:
        weight = self.all_parameters[0]  # (channels in, channels out / groups, *kernel)
        return len(weight) // self.groups * math.prod(weight.shape[2:])

    def weight_rows(self, weight: Tensor) -> Tensor:
        turned = weight.flip(tuple(range(2, weight.ndim)))
        grouped = turned.unflatten(0, (self.groups, -1))  # (groups, in / groups, out / groups, *kernel)
        return grouped.transpose(1, 2).flatten(0, 1).flatten(1)  # (out, in / groups · kernel)

    def weight_from_rows(self, rows: Tensor) -> Tensor:
        weight = self.all_parameters[0]
        shape = (self.groups, weight.shape[1], len(weight) // self.groups, *weight.shape[2:])
        turned = rows.reshape(shape).transpose(1, 2).reshape(weight.shape)
        return turned.flip(tuple(range(2, weight.ndim)))

    def module_call(self, inputs: Tensor) -> tuple[Tensor, Mapping[str, Any]]:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        return inputs, {name: getattr(self.module, name) for name in names}

    def weight_columns(self, inputs: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
        kernel = tuple(self.all_parameters[0].shape[2:])
        stride, dilation = (_each(arguments.get(name, 1), self.axes) for name in ("stride", "dilation"))
        padding, beyond = (_each(arguments.get(name, 0), self.axes) for name in ("padding", "output_padding"))
        spread = spread_with_zeros(inputs, stride)
        sides = [
            (reach := d * (k - 1) - p, reach + more)
            for k, d, p, more in zip(kernel, dilation, padding, beyond, strict=True)
        ]
        padded = F.pad(spread, [side for pair in reversed(sides) for side in pair])  # a negative side crops
        return list(patches(padded, kernel, (1,) * self.axes, dilation, self.groups))

    def positions(self, inputs: Tensor) -> int:
        stride = _each(self.module.stride, self.axes)
        return super().positions(inputs) * math.prod(stride)


def pad(images: Tensor, padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Images (batch, channels, *size) with zeros around them, as a convolution's `padding` says.

    Args:
        images: what is padded.
        padding: a number, one an axis, "valid" or "same".
        kernel, dilation: one an axis.
    """
    if padding == "same":
        reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, len(kernel))]
    return F.pad(images, [side for pair in reversed(sides) for side in pair])


def spread_with_zeros(images: Tensor, stride: Sequence[int]) -> Tensor:
    """Images (batch, channels, *size) with stride - 1 zeros between neighbouring pixels along each axis."""
    size = [(n - 1) * s + 1 for n, s in zip(images.shape[2:], stride, strict=True)]
    spread = images.new_zeros(*images.shape[:2], *size)
    places: Any = (..., *(slice(None, None, s) for s in stride))
    spread[places] = images
    return spread


def patches(
    images: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """The patches of padded images (batch, channels, *size) that a convolution sees, (groups, d, batch · positions)."""
    x = images
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(axis + 2, gap * (size - 1) + 1, step)[..., ::gap]
    batch, channels = x.shape[:2]
    x = x.reshape(batch, groups, channels // groups, -1, *kernel)  # (b, g, c, positions, *kernel)
    order = (1, 2, *range(4, 4 + len(kernel)), 0, 3)  # (g, c, *kernel, b, positions)
    return x.permute(order).reshape(groups, channels // groups * math.prod(kernel), -1)


def _each(value: Any, axes: int) -> tuple[int, ...]:
    """A setting as one number an axis."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * axes if len(values) == 1 else values
