"""Gradients orthogonal to a basis, at the least cost (paper Eqs. 6-7).

The textbook form G (I - M Mᵀ) with a dense d x d matrix costs 2·rows·d². The same numbers come cheaper from the
smaller basis (M, or N of its complement) and, for a Linear, from the smaller side: G = Δᵀ X, so G P = Δᵀ (X P), which
projects the batch's rows of X instead of the output units' rows of G.

Letters: G (o, d) a layer's weight gradient, M (d, k) its basis, N (d, d - k) of the complement, P = I - M Mᵀ = N Nᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradproj.errors import InputError
from gradproj.representation import Layer
from gradproj.subspace import orthogonal_complement


@contextmanager
def full_float32(tensor: Tensor) -> Iterator[None]:
    """Within this context products on a GPU do not round to TF32, which would put 3e-4 of a gradient back into a basis.

    Args:
        tensor: whose device is meant.
    """
    if not tensor.is_cuda:
        yield
        return
    flags = torch.backends.cuda.matmul
    name, exact = ("fp32_precision", "ieee") if hasattr(flags, "fp32_precision") else ("allow_tf32", False)
    before = getattr(flags, name)
    setattr(flags, name, exact)
    try:
        yield
    finally:
        setattr(flags, name, before)


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


class LayerProjector:
    """Projects the gradients of one layer's parameters, of all groups and with the bias as one more input.

    Args:
        groups: one for each of the layer's keys.
    """

    def __init__(self, groups: list[Projector]) -> None:
        self.groups = groups

    @property
    def is_idle(self) -> bool:
        """Nothing is remembered yet: gradients pass as they are."""
        return all(projector.route == "none" for projector in self.groups)

    @property
    def is_full(self) -> bool:
        """Every direction is taken: the layer can no longer learn."""
        return all(projector.route == "zero" for projector in self.groups)

    def __call__(self, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Project a weight-shaped tensor (o, ...) and a bias-shaped one (o,), together the rows [W, b] (o, d)."""
        rows = weight.flatten(1)
        if bias is not None:
            rows = torch.cat([rows, bias[:, None]], dim=1)
        parts = rows.chunk(len(self.groups)) if len(self.groups) > 1 else (rows,)
        parts = [project(part) for project, part in zip(self.groups, parts, strict=True)]
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        if bias is None:
            return rows.view_as(weight), None
        return rows[:, :-1].reshape(weight.shape), rows[:, -1]


def layer_projector(layer: Layer, bases: Mapping[str, Tensor]) -> LayerProjector:
    """Makes a layer's gradients orthogonal to its bases, (d, k) by key.

    Raises:
        InputError: the layer's weight trains and its bias does not, or the other way round.
    """
    weight, bias = layer.module.weight, layer.module.bias
    project = LayerProjector([orthogonal_projector(bases[key].to(weight.device), weight.dtype) for key in layer.keys])
    if bias is not None and bias.requires_grad != weight.requires_grad and not project.is_idle:
        raise InputError(
            f"of layer {layer.name} either the weight or the bias is frozen, but their directions are remembered "
            "together; train or freeze both"
        )
    return project


class _GradientSide(torch.autograd.Function):
    """The parameters as they are; their gradients projected."""

    @staticmethod
    def forward(ctx, weight: Tensor, bias: Tensor | None, project: LayerProjector):
        ctx.project = project
        return weight.view_as(weight), None if bias is None else bias.view_as(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weight: Tensor, grad_bias: Tensor | None):
        with full_float32(grad_weight):
            return *ctx.project(grad_weight, grad_bias), None


class _InputSide(torch.autograd.Function):
    """y = x Wᵀ + b, whose parameter gradients Δᵀ [X, 1] P are made from projected input rows.

    Under autocast the two products of the layer itself run in its dtype, as they would without protection; rows are
    projected in the weight's dtype, since rounding would put some of the gradient back into the basis.
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None, project: Projector):
        ctx.save_for_backward(inputs, weight)
        ctx.project, ctx.has_bias = project, bias is not None
        return F.linear(inputs, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        inputs, weight = ctx.saved_tensors
        grad_inputs = (grad_output @ weight.to(grad_output.dtype)).to(inputs.dtype) if ctx.needs_input_grad[0] else None
        rows = inputs.reshape(-1, inputs.shape[-1]).to(weight.dtype)  # (m, d)
        if ctx.has_bias:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        deltas = grad_output.reshape(-1, grad_output.shape[-1]).to(weight.dtype)  # (m, o)
        with full_float32(rows):
            grad = deltas.T @ ctx.project(rows)  # (o, d)
        if ctx.has_bias:
            return grad_inputs, grad[:, :-1], grad[:, -1], None
        return grad_inputs, grad, None, None


class _Still(torch.autograd.Function):
    """A layer's output as it is; depends on a weight without giving it a gradient, so that backward has where to go."""

    @staticmethod
    def forward(ctx, output: Tensor, weight: Tensor):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


class _ProjectedForward:
    """A layer's own forward, with projected parameter gradients; a copy of the layer gets its plain forward back."""

    def __init__(self, module: nn.Module, project: LayerProjector) -> None:
        self.module, self.project = module, project

    def __call__(self, input: Tensor) -> Tensor:
        module, weight, bias = self.module, self.module.weight, self.module.bias
        if self.project.is_full:  # the gradient is zero: do not compute it
            return _Still.apply(self.apply(input, weight.detach(), None if bias is None else bias.detach()), weight)
        if isinstance(module, nn.Linear) and input.numel() < weight.numel():
            return _InputSide.apply(input, weight, bias, self.project.groups[0])
        return self.apply(input, *_GradientSide.apply(weight, bias, self.project))

    def apply(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with other parameters."""
        if isinstance(self.module, nn.Linear):
            return F.linear(input, weight, bias)
        return self.module._conv_forward(input, weight, bias)

    def __reduce__(self):
        """Copied or pickled with its layer, it is the layer class's forward, bound to the copy."""
        return getattr, (self.module, "forward")


@contextmanager
def projected_gradients(
    layers: Mapping[str, Layer], bases: Mapping[str, Tensor]
) -> Iterator[dict[str, LayerProjector]]:
    """Within this context, backward gives the layers' parameters gradients orthogonal to their bases.

    The projection is a property of the layers, so any optimiser, gradient accumulation, AMP and data-parallel training
    see projected gradients. A full layer gets no gradient at all (None).

    Args:
        layers: the layers to protect, by name.
        bases: (d, k) for each key of each layer.
    """
    projectors = {name: layer_projector(layer, bases) for name, layer in layers.items()}
    with projecting(layers, projectors):
        yield projectors


@contextmanager
def projecting(layers: Mapping[str, Layer], projectors: Mapping[str, LayerProjector]) -> Iterator[None]:
    """Within this context, the layers' parameter gradients go through projectors of any kind, by layer name."""
    busy = {name: project for name, project in projectors.items() if not project.is_idle}
    for name in busy:  # all before any is replaced, so that a refusal leaves nothing behind
        module = layers[name].module
        if vars(module).get("forward", plain := MethodType(type(module).forward, module)) != plain:
            raise RuntimeError(f"the forward of layer {name} is replaced already: two protections cannot nest")
    for name, project in busy.items():
        layers[name].module.forward = _ProjectedForward(layers[name].module, project)
    try:
        yield
    finally:
        for name in busy:
            del layers[name].module.forward
