"""The packed input projection of multi-head attention, and its output projection inside it."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from gradproj import GradientProjectionMemory
from gradproj.layers import Layer, find_layers
from tests.gradproj.layers.case import LayerCase, Variant, normal


class SelfAttention(nn.Module):
    """Attention of a sequence to itself, with its output projection frozen, so that one layer trains."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.attention = attention
        attention.out_proj.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class TestAttention(LayerCase):
    variants = {
        "batch first": Variant(lambda: nn.MultiheadAttention(8, 2, batch_first=True), normal(1, 4, 8), normal(3, 5, 8)),
        "positions first": Variant(lambda: nn.MultiheadAttention(8, 2), normal(4, 1, 8), normal(5, 3, 8)),
        "no bias": Variant(lambda: nn.MultiheadAttention(8, 2, bias=False), normal(4, 1, 8), normal(5, 3, 8)),
    }

    def model(self, module: nn.Module) -> nn.Module:
        with torch.no_grad():
            for bias in (module.in_proj_bias, module.out_proj.bias):
                if bias is not None:
                    bias.normal_()
        return SelfAttention(module)

    def plain_columns(self, module: nn.Module, x: Tensor) -> list[np.ndarray]:
        x = x.transpose(0, 1) if module.batch_first else x  # functions see positions first
        return [x.reshape(-1, x.shape[-1]).T.numpy()]

    def output_rows(self, module: nn.Module, x: Tensor) -> Tensor:
        x = x.transpose(0, 1) if module.batch_first else x
        return nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias).flatten(0, 1).T

    def test_columns_are_those_of_plain_loops(self, variant, module):
        x = self.variants[variant].new(1)
        layer = self.layer(module)
        (found,) = layer.columns(x.transpose(0, 1) if layer.module.batch_first else x)
        expected = torch.from_numpy(self.plain_columns(layer.module, x)[0])
        assert_close(found[: len(expected)], expected, atol=0, rtol=0)

    @torch.no_grad()
    def test_rows_times_columns_are_the_output(self, variant, module):
        x = self.variants[variant].new(1)
        layer = self.layer(module)
        (columns,) = layer.columns(x.transpose(0, 1) if layer.module.batch_first else x)
        rows = layer.rows(*layer.parameters)
        assert_close(rows @ columns, self.output_rows(layer.module, x), atol=1e-12, rtol=0)


class CrossAttention(nn.Module):
    """Queries of one sequence, keys and values of another."""

    def __init__(self, **arguments) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **arguments)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, 2 * y, need_weights=False)[0]


@pytest.mark.parametrize("arguments", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}], ids=str)
@torch.no_grad()
def test_it_sees_queries_keys_and_values(arguments):
    torch.manual_seed(0)
    model = CrossAttention(**arguments).double()
    with pytest.warns(UserWarning, match="^not protected.*bias_k") if "add_bias_kv" in arguments else nullcontext():
        memory = GradientProjectionMemory(model)
    x, y = normal(1, 2, 8)(0), normal(1, 3, 8)(1)
    gathered = memory.gather(model, [(x, y)])
    columns = torch.cat([z.flatten(0, 1) for z in (x, y, 2 * y)])
    columns = torch.cat([columns, torch.ones(len(columns), 1)], dim=1).T
    assert_close(gathered["attention"].outer, columns @ columns.T, atol=1e-10, rtol=0)


@torch.no_grad()
def test_the_output_projection_sees_what_the_heads_have_made():
    torch.manual_seed(0)
    model = SelfAttention(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    model.attention.out_proj.requires_grad_(True)
    x = normal(2, 3, 8)(0)
    (packed, out) = find_layers(model).values()
    made = attended(model.attention, packed, x)
    gathered = GradientProjectionMemory(model).gather(model, [x])["attention.out_proj"].outer
    assert_close(gathered[:8, :8], made.T @ made, atol=1e-10, rtol=0)
    assert_close(made @ out.module.weight.T + out.module.bias, model(x).flatten(0, 1), atol=1e-10, rtol=0)


def attended(attention: nn.MultiheadAttention, packed: Layer, x: Tensor) -> Tensor:
    """What the heads make of a sequence (batch, positions, d) before the output projection, written out."""
    q, k, v = nn.functional.linear(x, *packed.parameters).chunk(3, dim=-1)
    q, k, v = (z.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2).flatten(0, 1)
