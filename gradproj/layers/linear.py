"""Linear layers: every position of an input is a column."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradproj.layers.attention import ATTENTION
from gradproj.layers.base import Call, RowsLayer


class LinearLayer(RowsLayer):
    """y = W x + b on rows x (..., d)."""

    kind = "Linear"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear,)
    functions = {
        F.linear: Call(("input", "weight", "bias")),
        F.multi_head_attention_forward: Call(ATTENTION, "out_proj_weight", "out_proj_bias"),
    }

    def inputs(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        if function is not F.multi_head_attention_forward:
            return [arguments["input"]]
        # An attention's output projection is applied inside: with the identity in its place the output is its input.
        weight = arguments["out_proj_weight"]
        changed = {"out_proj_weight": torch.eye(len(weight), weight.shape[1]).to(weight), "out_proj_bias": None}
        return [function(**{**arguments, **changed})[0]]


class TransposedLinearLayer(LinearLayer):
    """y = x W + b with W (d, o): the Conv1D of GPT-2 and its relatives in the transformers library."""

    kind = "Conv1D"
    modules: ClassVar[tuple[type[nn.Module], ...]] = ()
    functions = {torch.addmm: Call(("bias", "input", "weight"))}

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return f"{type(module).__module__}.{type(module).__name__}" == "transformers.pytorch_utils.Conv1D"

    @property
    def weight_size(self) -> int:
        return len(self.all_parameters[0])

    def weight_rows(self, weight: Tensor) -> Tensor:
        return weight.T

    def weight_from_rows(self, rows: Tensor) -> Tensor:
        return rows.T

    def apply(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(inputs, weight.T, bias)
