"""Convolutions and transposed convolutions, against plain loops over patches."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests import reference
from tests.gradproj.layers.case import LayerCase, Variant, normal


def flat(channels: int, *size: int) -> Callable[[int], Tensor]:
    """By seed, one image without detail: its patches have few directions."""
    return lambda seed: normal(1, channels, *([1] * len(size)))(seed).expand(1, channels, *size).clone()


def convolution(make: type[nn.Module], n_in: int, n_out: int, kernel: tuple, size: tuple, **arguments) -> Variant:
    return Variant(lambda: make(n_in, n_out, kernel, **arguments), flat(n_in, *size), normal(2, n_in, *size))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
class TestConvolution(LayerCase):
    variants = {
        "1x1": convolution(nn.Conv2d, 3, 4, (1, 1), (4, 5), bias=False),
        "plain": convolution(nn.Conv2d, 2, 3, (3, 2), (6, 5)),
        "no bias": convolution(nn.Conv2d, 2, 3, (3, 2), (6, 5), bias=False),
        "stride": convolution(nn.Conv2d, 2, 3, (3, 3), (8, 7), stride=2),
        "stride longer than the kernel": convolution(nn.Conv2d, 2, 3, (1, 1), (8, 7), stride=3),
        "uneven stride": convolution(nn.Conv2d, 2, 3, (2, 3), (5, 9), stride=(1, 3)),
        "padding": convolution(nn.Conv2d, 2, 3, (3, 3), (5, 4), padding=1),
        "uneven padding": convolution(nn.Conv2d, 2, 3, (3, 5), (5, 4), padding=(0, 2)),
        "padding same": convolution(nn.Conv2d, 2, 3, (3, 5), (5, 4), padding="same"),
        "padding same, even kernel": convolution(nn.Conv2d, 2, 3, (2, 4), (7, 9), padding="same", dilation=(1, 3)),
        "padding valid": convolution(nn.Conv2d, 2, 3, (3, 3), (5, 4), padding="valid"),
        "stride, padding, dilation": convolution(nn.Conv2d, 2, 3, (3, 2), (7, 6), stride=(2, 1), padding=2, dilation=2),
        "groups": convolution(nn.Conv2d, 4, 6, (3, 3), (5, 4), groups=2, padding=1),
        "depthwise": convolution(nn.Conv2d, 4, 4, (3, 3), (7, 6), groups=4, stride=2),
        "reflect": convolution(nn.Conv2d, 2, 3, (3, 3), (5, 4), padding=2, padding_mode="reflect"),
        "replicate": convolution(nn.Conv2d, 2, 3, (3, 3), (5, 4), padding=(1, 2), padding_mode="replicate"),
        "circular": convolution(nn.Conv2d, 2, 3, (3, 3), (5, 4), padding=(2, 1), padding_mode="circular", stride=2),
        "one axis": convolution(nn.Conv1d, 4, 6, (3,), (11,), stride=2, padding=1, dilation=2, groups=2),
        "one axis, same": convolution(nn.Conv1d, 3, 3, (4,), (9,), padding="same"),
        "three axes": convolution(nn.Conv3d, 2, 4, (2, 3, 2), (3, 5, 3), stride=(1, 2, 1), padding=(0, 1, 0), groups=2),
    }

    def plain_columns(self, module: nn.Module, x: Tensor) -> list[np.ndarray]:
        names = ("stride", "padding", "dilation", "groups", "padding_mode")
        return list(reference.conv_patches(x, module.kernel_size, **{name: getattr(module, name) for name in names}))

    def output_rows(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x).transpose(0, 1).flatten(1)

    def test_an_image_without_batch_axis(self, variant, module):
        layer, x = self.layer(module), self.variants[variant].new(1)[0]
        assert all(map(torch.equal, layer.columns(x), layer.columns(x[None])))


class TestTransposedConvolution(TestConvolution):
    variants = {
        "plain": convolution(nn.ConvTranspose2d, 3, 2, (3, 2), (4, 5)),
        "stride": convolution(nn.ConvTranspose2d, 3, 2, (3, 3), (4, 3), stride=2),
        "stride of the kernel": convolution(nn.ConvTranspose2d, 3, 2, (2, 2), (4, 3), stride=2, bias=False),
        "stride longer than the kernel": convolution(nn.ConvTranspose2d, 3, 2, (2, 2), (4, 3), stride=3),
        "padding": convolution(nn.ConvTranspose2d, 3, 2, (3, 3), (4, 3), stride=2, padding=1, output_padding=1),
        "padding beyond the kernel": convolution(nn.ConvTranspose2d, 3, 2, (2, 2), (5, 6), padding=2),
        "dilation": convolution(nn.ConvTranspose2d, 3, 2, (2, 3), (4, 5), dilation=(2, 1), stride=(1, 2)),
        "groups": convolution(nn.ConvTranspose2d, 4, 6, (2, 2), (3, 3), groups=2, stride=2),
        "one axis": convolution(nn.ConvTranspose1d, 4, 2, (4,), (6,), stride=2, padding=1, groups=2),
        "three axes": convolution(nn.ConvTranspose3d, 2, 2, (2, 2, 2), (2, 3, 2), stride=2, padding=(0, 1, 0)),
    }

    def plain_columns(self, module: nn.Module, x: Tensor) -> list[np.ndarray]:
        """For each place of the output, the pixels that its definition multiplies there, kernel positions backwards."""
        size, kernel = module(x).shape[2:], module.kernel_size
        per_group = module.in_channels // module.groups
        parts = []
        for group in range(module.groups):
            columns = []
            for image in x[:, group * per_group : (group + 1) * per_group].numpy():
                for place in itertools.product(*map(range, size)):
                    column = []
                    for channel in image:
                        for turned in itertools.product(*(range(k - 1, -1, -1) for k in kernel)):
                            column.append(self.pixel(module, channel, place, turned))
                    columns.append(column)
            parts.append(np.array(columns).T)
        return parts

    def pixel(self, module: nn.Module, channel: np.ndarray, place: tuple, tap: tuple) -> float:
        """The pixel i with place = i · stride - padding + dilation · tap on every axis; 0 where there is none."""
        index = []
        for p, k, s, pad, d, n in zip(
            place, tap, module.stride, module.padding, module.dilation, channel.shape, strict=True
        ):
            i, rest = divmod(p + pad - d * k, s)
            if rest or not 0 <= i < n:
                return 0.0
            index.append(i)
        return float(channel[tuple(index)])
