"""What happens while a memory protects: the layers' parameters get projected gradients (paper Eqs. 6-7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from gradproj.layers.linear import LinearLayer
from gradproj.projection import LayerProjector, Projector, full_float32


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
    """A layer's output as it is; it hangs on a weight, which gets no gradient, so that backward() works."""

    @staticmethod
    def forward(ctx, output: Tensor, weight: Tensor):
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


class Protection:
    """What is going on in a `projecting` context.

    Attributes:
        projectors: by layer name.
        is_on: whether gradients are projected at the moment.
    """

    def __init__(self, projectors: Mapping[str, LayerProjector]) -> None:
        self.projectors, self.is_on = projectors, True


class _ProjectedForward:
    """A layer's own forward, with projected parameter gradients; a copy of the layer gets its plain forward back."""

    def __init__(self, project: LayerProjector, protection: Protection) -> None:
        self.layer, self.project, self.protection = project.layer, project, protection

    def __call__(self, input: Tensor) -> Tensor:
        weight, bias = self.layer.parameters
        if not self.protection.is_on:
            return self.layer.apply(input, weight, bias)
        if self.project.is_full:  # the gradient is zero: do not compute it
            output = self.layer.apply(input, weight.detach(), None if bias is None else bias.detach())
            return _Still.apply(output, weight)
        if isinstance(self.layer, LinearLayer) and input.numel() < weight.numel():
            return _InputSide.apply(input, weight, bias, self.project.groups[0])
        return self.layer.apply(input, *_GradientSide.apply(weight, bias, self.project))

    def __reduce__(self):
        """Copied or pickled with its layer, it is the layer class's forward, bound to the copy."""
        return getattr, (self.layer.module, "forward")


@contextmanager
def projecting(projectors: Mapping[str, LayerProjector]) -> Iterator[Protection]:
    """Within this context, backward gives layers' parameters gradients that went through projectors of any kind.

    The projection is a property of the layers, so any optimiser, gradient accumulation, AMP and data-parallel training
    see projected gradients. A full layer gets no gradient at all (None).

    Args:
        projectors: by layer name; idle ones leave their layer alone.
    Raises:
        RuntimeError: a layer is protected already.
    """
    protection = Protection(projectors)
    busy = {name: project for name, project in projectors.items() if not project.is_idle}
    for name, project in busy.items():  # all before any is replaced, so that a refusal leaves nothing behind
        module = project.layer.module
        if vars(module).get("forward", plain := MethodType(type(module).forward, module)) != plain:
            raise RuntimeError(f"the forward of layer {name} is replaced already: two protections cannot nest")
    for project in busy.values():
        project.layer.module.forward = _ProjectedForward(project, protection)
    try:
        yield protection
    finally:
        for project in busy.values():
            del project.layer.module.forward
