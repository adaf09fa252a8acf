"""Gradients orthogonal to a basis, at the least cost (paper Eqs. 6-7).

The textbook form G (I - M Mᵀ) with a dense d x d matrix costs 2·rows·d². The same numbers come cheaper from the
smaller basis (M, or N of its complement) and, for a Linear, from the smaller side: G = Δᵀ X, so G P = Δᵀ (X P), which
projects the batch's rows of X instead of the output units' rows of G.

Letters: G (o, d) a layer's weight gradient, M (d, k) its basis, N (d, d - k) of the complement, P = I - M Mᵀ = N Nᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from gradproj.errors import InputError
from gradproj.layers import Layer
from gradproj.layers.embedding import EmbeddingLayer, TiedEmbeddingLayer
from gradproj.subspace import orthogonal_complement


def set_tf32(backend: Any, allow: bool) -> Callable[[], None]:
    """Let an NVIDIA GPU round the operands of float32 products to TF32, or forbid it; returns what undoes that.

    torch has two kinds of flags for this and refuses to read one where the other was set. So this sets the older kind,
    which all versions have, and the newer one only where somebody else does.

    Args:
        backend: torch.backends.cuda.matmul or torch.backends.cudnn.
        allow: whether to round.
    """
    name, value = "allow_tf32", allow  # type: str, Any
    try:
        before = backend.allow_tf32
    except RuntimeError:
        name, before, value = "fp32_precision", backend.fp32_precision, "tf32" if allow else "ieee"
    setattr(backend, name, value)
    return lambda: setattr(backend, name, before)


@contextmanager
def full_float32(tensor: Tensor) -> Iterator[None]:
    """Within this context products on a GPU do not round to TF32, which would put 3e-4 of a gradient back into a basis.

    Args:
        tensor: whose device is meant.
    """
    if not tensor.is_cuda:
        yield
        return
    undo = set_tf32(torch.backends.cuda.matmul, allow=False)
    try:
        yield
    finally:
        undo()


Route = Literal["none", "zero", "subtract", "keep", "dense"]

# One dense product beats two thin ones up to this size for few rows, and on a GPU, where starting a kernel costs more
# than its arithmetic; for many rows two thin ones may win, but then by microseconds (docs/performance.md).
DENSE_SIZE = 128
# A thin pair costs 4·rows·d·r against 2·rows·d² dense: equal at r = d/2, measured equal at a little less.
DENSE_RATIO = 0.45


def cheapest_route(d: int, k: int) -> Route:
    """How to multiply rows by P: the rule is confirmed by benchmarks/speed.py.

    Args:
        d: input size of the layer.
        k: columns of its basis.
    Returns:
        "none": k = 0, nothing to remove. "zero": k = d, nothing left. "dense": G P. "subtract": G - (G M) Mᵀ.
        "keep": (G N) Nᵀ, when the complement is the smaller basis.
    """
    if k == 0:
        return "none"
    if k >= d:
        return "zero"
    if d <= DENSE_SIZE or min(k, d - k) > DENSE_RATIO * d:
        return "dense"
    return "subtract" if k <= d - k else "keep"


class Projector:
    """Multiplies rows by a symmetric matrix P (d, d).

    Args:
        route: in which form.
        factor: in the rows' dtype: P itself for "dense", N for "keep", else M.
    """

    def __init__(self, route: Route, factor: Tensor) -> None:
        self.route, self.factor = route, factor.contiguous()
        self.factor_t = self.factor.T.contiguous()  # a product of two plain row-major matrices is the fastest one

    def __call__(self, rows: Tensor) -> Tensor:
        """rows (m, d) to rows P (m, d)."""
        if self.route == "none":
            return rows
        if self.route == "zero":
            return torch.zeros_like(rows)
        if self.route == "dense":
            return rows @ self.factor
        inside = rows @ self.factor  # (m, k) or (m, d - k)
        if self.route == "keep":
            return inside @ self.factor_t
        return torch.addmm(rows, inside, self.factor_t, alpha=-1)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision to project rows of some precision in: half precision would put 1e-3 of a gradient into a basis."""
    return torch.promote_types(dtype, torch.float32)


def orthogonal_projector(basis: Tensor, dtype: torch.dtype, route: Route | None = None) -> Projector:
    """Multiplies rows by P = I - M Mᵀ.

    Args:
        basis: (d, k) orthonormal columns, float64.
        dtype: of the rows.
        route: chosen by cost where not given.
    """
    route = cheapest_route(*basis.shape) if route is None else route
    factor = basis
    if route == "dense":
        factor = torch.eye(len(basis), dtype=basis.dtype, device=basis.device) - basis @ basis.T
    elif route == "keep":
        factor = orthogonal_complement(basis)
    return Projector(route, factor.to(dtype))


def size(tensors: Iterable[Tensor]) -> float:
    """The length of some tensors together; 0 where there are none."""
    return sum(tensor.double().square().sum().item() for tensor in tensors) ** 0.5


class LayerProjector:
    """Projects the gradients of one layer's parameters, of all groups and with the bias as one more input.

    Args:
        layer: whose parameters.
        groups: one for each of the layer's keys.
    Raises:
        InputError: what is trained of the layer is not what was when it was found.

    Attributes:
        first_size: at least the length of the first gradient that backward has projected; None before.
    """

    def __init__(self, layer: Layer, groups: list[Projector]) -> None:
        self.layer, self.groups = layer, groups
        self.first_size: Tensor | None = None
        trained = tuple(p is not None and p.requires_grad for p in layer.all_parameters)
        if trained != layer.trained and any(trained) and not self.is_idle:
            raise InputError(
                f"of layer {layer.name} either the weight or the bias is frozen, but their directions are remembered "
                "together; train or freeze both"
            )

    @property
    def is_idle(self) -> bool:
        """Nothing is remembered yet: gradients pass as they are."""
        return all(projector.route == "none" for projector in self.groups)

    @property
    def is_full(self) -> bool:
        """Every direction is taken: the layer can no longer learn."""
        return all(projector.route == "zero" for projector in self.groups)

    def __call__(self, weight: Tensor | None, bias: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Project tensors of the shapes of what is trained of weight and bias, together the rows [W, b] (o, d)."""
        dtype = self.layer.dtype
        rows = self.layer.rows(*(None if p is None else p.to(product_dtype(dtype)) for p in (weight, bias)))
        with full_float32(rows):
            weight, bias = self.layer.from_rows(self.project_rows(rows))
        return None if weight is None else weight.to(dtype), None if bias is None else bias.to(dtype)

    def project_rows(self, rows: Tensor) -> Tensor:
        """Rows (o, d), group after group, each group's projected."""
        groups = rows.chunk(len(self.groups)) if len(self.groups) > 1 else (rows,)
        parts = [project(part) for project, part in zip(self.groups, groups, strict=True)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class RowProjector(LayerProjector):
    """Projects the gradient of an embedding's table: rows that were seen get none, ΔW ← (I - S) ΔW (I - M Mᵀ).

    Args:
        layer: whose table.
        seen: (k,) the rows S that were looked up.
        columns: what the rows' own columns go through, where the table is an output head's weight too.
    """

    def __init__(self, layer: Layer, seen: Tensor, columns: Projector | None = None) -> None:
        self.seen = seen
        super().__init__(layer, [] if columns is None else [columns])

    @property
    def is_idle(self) -> bool:
        return not len(self.seen) and super().is_idle

    @property
    def is_full(self) -> bool:
        return len(self.seen) == self.layer.weight_size or (bool(self.groups) and super().is_full)

    def project_rows(self, rows: Tensor) -> Tensor:
        if not self.groups:  # rows as its layer has them: one a component, W turned
            return rows.index_fill(1, self.seen, 0)
        return super().project_rows(rows).index_fill(0, self.seen, 0)


def layer_projector(layer: Layer, bases: Mapping[str, Tensor]) -> LayerProjector:
    """Makes a layer's gradients orthogonal to its subspaces, by key: bases (d, k), or rows (k,) of an embedding.

    It raises what LayerProjector does.
    """
    held = {key: bases[key].to(layer.device) for key in layer.keys}
    dtype = product_dtype(layer.dtype)
    if isinstance(layer, TiedEmbeddingLayer):
        return RowProjector(layer, held[layer.name], orthogonal_projector(held[layer.head_name], dtype))
    if isinstance(layer, EmbeddingLayer):
        return RowProjector(layer, held[layer.name])
    return LayerProjector(layer, [orthogonal_projector(held[key], dtype) for key in layer.keys])
