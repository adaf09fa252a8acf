"""Embeddings: the rows that a task has looked up stay; also where the table is the output head's weight too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradproj.layers.base import Call, Layer, with_constant
from gradproj.layers.linear import LinearLayer

ARGUMENTS = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")


class EmbeddingLayer(Layer):
    """y = the row of W that an index names: W sees one-hot columns, whose span is the rows that were seen.

    So its subspace needs no basis: what is remembered are the indices. They are remembered whatever the threshold,
    since a row that is seen once is what its word means.

    Args:
        name: of the module.
        module: an embedding; others of `shared` may use the same table.
        shared: further embeddings with the same weight.
    """

    kind = "embedding"
    modules: ClassVar[tuple[type[nn.Module], ...]] = (nn.Embedding,)
    functions = {F.embedding: Call(ARGUMENTS)}

    def __init__(self, name: str, module: nn.Module, shared: tuple[nn.Module, ...] = ()) -> None:
        self.shared = shared
        super().__init__(name, module)

    @property
    def owners(self) -> tuple[tuple[nn.Module, str], ...]:
        return tuple((module, self.weight_name) for module in (self.module, *self.shared))

    @property
    def weight_size(self) -> int:
        """Rows of the table: the length of a one-hot column."""
        return len(self.all_parameters[0])

    def weight_rows(self, weight: Tensor) -> Tensor:
        return weight.T

    def weight_from_rows(self, rows: Tensor) -> Tensor:
        return rows.T

    def understands(self, arguments: Mapping[str, Any]) -> bool:
        return not arguments.get("sparse") and arguments.get("max_norm") is None

    def seen(
        self, inputs: Tensor, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> Iterator[dict[str, Tensor]]:
        yield {self.name: inputs.flatten()}

    def empty_basis(self, key: str) -> Tensor:
        return torch.zeros(0, dtype=torch.int64) if key == self.name else super().empty_basis(key)

    def position_axes(self, inputs: Tensor) -> int:
        return inputs.ndim - inputs.is_floating_point()  # indices, or what the head sees

    def inside(self, key: str, basis: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        assert weight is not None  # an embedding's only parameter
        return weight[basis.to(weight.device)].norm(), weight.norm()


class TiedEmbeddingLayer(EmbeddingLayer):
    """An embedding whose table W (rows, d) is also the weight of a Linear, as GPT-2's output head.

    It has two subspaces: rows S that were looked up, and columns M that the head has seen. A change
    ΔW ← (I - S) ΔW (I - M Mᵀ) moves neither. A bias of the head is taken along as [ΔW, Δb].

    Args:
        name, module, shared: of the embeddings.
        head: the Linear, with the name of its subspace.
        head_name: its name.
    """

    kind = "tied embedding"
    functions = {**EmbeddingLayer.functions, F.linear: LinearLayer.functions[F.linear]}

    def __init__(
        self, name: str, module: nn.Module, shared: tuple[nn.Module, ...], head_name: str, head: nn.Linear
    ) -> None:
        self.head, self.head_name = head, head_name
        super().__init__(name, module, shared)

    @property
    def all_parameters(self) -> tuple[nn.Parameter, nn.Parameter | None]:
        return self.module.weight, self.head.bias

    @property
    def owners(self) -> tuple[tuple[nn.Module, str], ...]:
        return (*super().owners, (self.head, "weight"), (self.head, "bias"))

    @property
    def keys(self) -> list[str]:
        return [self.name, self.head_name]

    @property
    def sizes(self) -> dict[str, int]:
        return {self.name: self.weight_size, self.head_name: self.all_parameters[0].shape[1] + self.trained[1]}

    def rows(self, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        assert weight is not None  # else nothing was tied
        return weight if bias is None else torch.cat([weight, bias[:, None]], dim=1)

    def from_rows(self, rows: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return (rows[:, :-1], rows[:, -1]) if self.trained[1] else (rows, None)

    def seen(
        self, inputs: Tensor, function: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> Iterator[dict[str, Tensor]]:
        if function is F.embedding:
            yield from super().seen(inputs, function, arguments)
            return
        columns = inputs.reshape(-1, inputs.shape[-1]).T
        adds_bias = self.adds_bias(function, arguments)
        yield {self.head_name: with_constant(columns, adds_bias) if self.trained[1] else columns}

    def inside(self, key: str, basis: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if key == self.name:
            return super().inside(key, basis, weight, bias)
        rows = self.rows(weight, bias).double()
        return (rows @ basis.to(rows)).norm(), rows.norm()
