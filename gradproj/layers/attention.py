"""The packed input projection of torch's multi-head attention: what it projects are its columns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from gradproj.layers.base import Call, RowsLayer

ATTENTION = tuple(inspect.signature(F.multi_head_attention_forward).parameters)  # names of its arguments


class AttentionLayer(RowsLayer):
    """[q, k, v] = W_in x + b: one subspace for all three, which sees queries, keys and values as far as they differ."""

    kind = "attention"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.MultiheadAttention,)
    functions = {F.multi_head_attention_forward: Call(ATTENTION, "in_proj_weight", "in_proj_bias")}
    weight_name, bias_name = "in_proj_weight", "in_proj_bias"

    @classmethod
    def matches(cls, module: nn.Module) -> bool:
        return isinstance(module, cls.modules) and module.in_proj_weight is not None

    def inputs(self, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Sequence[Tensor]:
        seen = [arguments[name] for name in ("query", "key", "value")]
        return [x for i, x in enumerate(seen) if not any(x is earlier for earlier in seen[:i])]
