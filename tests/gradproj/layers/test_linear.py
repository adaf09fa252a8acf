"""Linear layers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from tests.gradproj.layers.case import LayerCase, Variant, normal


class TestLinear(LayerCase):
    variants = {
        "plain": Variant(lambda: nn.Linear(7, 4), normal(3, 7), normal(9, 7)),
        "no bias": Variant(lambda: nn.Linear(7, 4, bias=False), normal(3, 7), normal(9, 7)),
        "positions": Variant(lambda: nn.Linear(9, 4), normal(2, 2, 9), normal(2, 2, 3, 9)),
        "one sample": Variant(lambda: nn.Linear(7, 4), normal(7), normal(9, 7)),
        "more outputs than inputs": Variant(lambda: nn.Linear(5, 30), normal(2, 5), normal(2, 5)),
    }

    def plain_columns(self, module: nn.Module, x: Tensor) -> list[np.ndarray]:
        return [np.stack([row.numpy() for row in x.reshape(-1, x.shape[-1])], axis=1)]

    def output_rows(self, module: nn.Module, x: Tensor) -> Tensor:
        return module(x).flatten(0, -2).T


class TestTransposedLinear(TestLinear):
    """transformers' Conv1D, or where that is not installed, one that is called so."""

    variants = {
        "plain": Variant(lambda: conv1d(7, 4), normal(3, 7), normal(9, 7)),
        "positions": Variant(lambda: conv1d(9, 4), normal(2, 2, 9), normal(2, 2, 3, 9)),
    }


def conv1d(n_in: int, n_out: int) -> nn.Module:
    """A transposed Linear with a weight (in, out)."""
    try:
        from transformers.pytorch_utils import Conv1D
    except ImportError:
        Conv1D = type("Conv1D", (_Conv1D,), {"__module__": "transformers.pytorch_utils"})
    return Conv1D(n_out, n_in)


class _Conv1D(nn.Module):
    def __init__(self, n_out: int, n_in: int) -> None:
        super().__init__()
        self.nf = n_out
        self.weight = nn.Parameter(0.02 * torch.randn(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)
