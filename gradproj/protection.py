"""What happens while a memory protects: the layers' parameters get projected gradients (paper Eqs. 6-7)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from gradproj.concerns import used_otherwise
from gradproj.errors import InputError
from gradproj.layers import Layer
from gradproj.layers.linear import LinearLayer
from gradproj.layers.uses import Uses
from gradproj.projection import LayerProjector, full_float32, product_dtype


class _GradientSide(torch.autograd.Function):
    """A layer's parameters as they are; their gradients projected."""

    @staticmethod
    def forward(ctx, weight: Tensor | None, bias: Tensor | None, project: LayerProjector):
        ctx.project = project
        with torch._C.DisableTorchFunction():
            return tuple(None if p is None else p.view_as(p) for p in (weight, bias))

    @staticmethod
    def backward(ctx, grad_weight: Tensor | None, grad_bias: Tensor | None):
        given = [g for g in (grad_weight, grad_bias) if g is not None]
        if any(map(is_legacy_batchedtensor, given)):
            raise InputError(
                "is_grads_batched takes gradients of parameters that cannot be projected; take one at a time"
            )
        if ctx.project.first_size is None:
            ctx.project.first_size = sum(g.detach().norm() for g in given)
        return *ctx.project(grad_weight, grad_bias), None


def _is_transformed() -> bool:
    """Whether a forward pass is inside a transform of torch.func, or makes forward-mode gradients."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _by_plain_operations(weight: Tensor | None, bias: Tensor | None, project: LayerProjector) -> list[Tensor | None]:
    """What _GradientSide does where gradients are no plain ones, which take no such Function: p + P (p - p)."""
    with torch._C.DisableTorchFunction():
        zeros = project(*(None if p is None else p - p.detach() for p in (weight, bias)))
        pairs = zip((weight, bias), zeros, strict=True)
        return [None if p is None or zero is None else p.detach() + zero for p, zero in pairs]


class _InputSide(torch.autograd.Function):
    """y = x Wᵀ + b, whose parameter gradients Δᵀ [X, 1] P are made from projected input rows.

    Under autocast the two products of the layer itself run in its dtype, as they would without protection; rows are
    projected in the weight's dtype, since rounding would put some of the gradient back into the basis.
    """

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, bias: Tensor | None, project: LayerProjector):
        ctx.save_for_backward(inputs, weight, *(() if bias is None else (bias,)))
        ctx.project = project
        with torch._C.DisableTorchFunction():
            return F.linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        inputs, weight, *bias = ctx.saved_tensors
        if torch.is_grad_enabled():  # gradients of gradients are projected like any other
            weight = _GradientSide.apply(weight, *(bias or [None]), ctx.project)[0]
        grad_inputs = (grad_output @ weight.to(grad_output.dtype)).to(inputs.dtype) if ctx.needs_input_grad[0] else None
        dtype = product_dtype(weight.dtype)
        rows = inputs.reshape(-1, inputs.shape[-1]).to(dtype)  # (m, d)
        if bias:
            rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        deltas = grad_output.reshape(-1, grad_output.shape[-1]).to(dtype)  # (m, o)
        if ctx.project.first_size is None and not is_legacy_batchedtensor(deltas):
            ctx.project.first_size = deltas.detach().norm() * rows.detach().norm()
        with full_float32(rows):
            grad = (deltas.T @ ctx.project.project_rows(rows)).to(weight.dtype)  # (o, d)
        if bias:
            return grad_inputs, grad[:, :-1], grad[:, -1], None
        return grad_inputs, grad, None, None


class _Still(torch.autograd.Function):
    """A copy of an output that hangs on a parameter, which gets no gradient, so that backward() works."""

    @staticmethod
    def forward(ctx, output: Tensor, parameter: Tensor):
        return output.clone()  # not a view: the model may go on to change it in place

    @staticmethod
    def backward(ctx, grad_output: Tensor):
        return grad_output, None


Say = Callable[[list[tuple[str, str]]], None]


class Protection:
    """What is going on in a `projecting` context.

    Attributes:
        projectors: by layer name.
        is_on: whether gradients are projected at the moment.
    """

    def __init__(self, projectors: Mapping[str, LayerProjector]) -> None:
        self.projectors, self.is_on = projectors, True


class _HostForward:
    """A module's own forward, run on the parameters of some layers as they are but with projected gradients.

    It computes exactly what it computes outside: the parameters that it finds have the same storage.

    Args:
        module: whose forward applies the layers' weights; often the layer itself.
        projects: the layers' projectors.
        protection: the context.
    """

    def __init__(self, module: nn.Module, projects: Sequence[LayerProjector], protection: Protection) -> None:
        self.module: Any = module
        self.projects, self.protection = projects, protection
        self.replaced: Callable[..., Any] | None = vars(module).get("forward")  # by hooks of other libraries
        self.forward: Callable[..., Any] = module.forward
        layer = projects[0].layer
        plain = self.replaced is None and type(module).forward is nn.Linear.forward and layer.module is module
        whole = all(a is b for a, b in zip(layer.parameters, layer.all_parameters, strict=True))
        self.is_linear = plain and type(layer) is LinearLayer and whole
        self.uncompiled = _uncompiled()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Compiled models run these layers as written, the rest compiled."""
        return self.uncompiled(self, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if not self.protection.is_on or not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        if self.is_linear and not self.projects[0].is_full and not _is_transformed():
            (inputs,) = (*args, *kwargs.values())
            weight, bias = self.module.weight, self.module.bias
            if inputs.numel() < weight.numel() and all(p.requires_grad for p in (weight, bias) if p is not None):
                return _InputSide.apply(inputs, weight, bias, self.projects[0])
        found = [(owner, name, p) for project in self.projects for owner, name, p in _trained(project.layer)]
        try:
            for project in self.projects:
                self._substitute(project)
            output = self.forward(*args, **kwargs)
        finally:
            for owner, name, p in found:
                owner._parameters[name] = p
        return _hung_on(output, found[0][2]) if found and all(p.is_full for p in self.projects) else output

    def _substitute(self, project: LayerProjector) -> None:
        """Put substitutes in the places of a layer's parameters."""
        weight, bias = project.layer.parameters
        training = {p.requires_grad for p in (weight, bias) if p is not None}
        if training == {False}:
            return
        if len(training) > 1:
            raise InputError(
                f"of layer {project.layer.name} the weight or the bias was frozen inside protect(), but their "
                "directions are remembered together; train or freeze both"
            )
        if project.is_full:  # the gradient is zero: do not compute it
            with torch._C.DisableTorchFunction():
                substitutes: Any = [None if p is None else p.detach() for p in (weight, bias)]
        elif _is_transformed():
            substitutes = _by_plain_operations(weight, bias, project)
        else:
            substitutes = _GradientSide.apply(weight, bias, project)
        for owner, name, p in _trained(project.layer):
            owner._parameters[name] = substitutes[0] if p is weight else substitutes[1]

    def __reduce__(self):
        """Copied or pickled with its module, it is what was there before: the class's forward, bound to the copy."""
        return (getattr, (self.module, "forward")) if self.replaced is None else (_itself, (self.replaced,))


@functools.cache
def _uncompiled() -> Callable[..., Any]:
    """`_HostForward.run`, hidden from the compiler; not by a decorator, which would import that."""
    return torch.compiler.disable(_HostForward.run)


def _itself(thing: Any) -> Any:
    return thing


def _trained(layer: Layer) -> list[tuple[nn.Module, str, Any]]:
    """Where a layer's parameters that are trained now are looked up: module, name, parameter."""
    parameters = [p for p in layer.parameters if p is not None and p.requires_grad]
    places = [(owner, name, owner._parameters.get(name)) for owner, name in layer.owners]
    return [(owner, name, p) for owner, name, p in places if any(p is other for other in parameters)]


def _hung_on(output: Any, parameter: Tensor) -> Any:
    """An output that backward() can start from although nothing before it has a gradient."""
    if isinstance(output, Tensor):
        return output if output.requires_grad or not output.is_floating_point() else _Still.apply(output, parameter)
    if isinstance(output, tuple) and not hasattr(output, "_fields"):
        return tuple(_hung_on(part, parameter) for part in output)
    return output


@contextmanager
def projecting(
    projectors: Mapping[str, LayerProjector], hosts: Mapping[str, Sequence[nn.Module]] | None = None
) -> Iterator[Protection]:
    """Within this context, backward gives layers' parameters gradients that went through projectors of any kind.

    The projection is a property of the layers, so any optimiser, gradient accumulation, AMP and data-parallel training
    see projected gradients. A full layer gets no gradient at all (None).

    Args:
        projectors: by layer name; idle ones leave their layer alone.
        hosts: by layer name, the modules whose forward applies its weight; the layer's own where not given.
    Raises:
        RuntimeError: a layer is protected already.
    """
    protection = Protection(projectors)
    at: dict[nn.Module, list[LayerProjector]] = {}
    for name, project in projectors.items():
        if not project.is_idle:
            own = [owner for owner, _ in project.layer.owners]
            for module in dict.fromkeys([*own, *(hosts or {}).get(name, ())]):
                if isinstance(vars(module).get("forward"), _HostForward):
                    raise RuntimeError(f"the forward of layer {name} is replaced already: two protections cannot nest")
                at.setdefault(module, []).append(project)
    before = {module: vars(module).get("forward") for module in at}
    for module, projects in at.items():
        module.forward = _HostForward(module, projects, protection)
    try:
        yield protection
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _place(tensor: Tensor) -> int:
    """Where a tensor's entries are, but inside transforms of torch.func, where that is not known."""
    return 0 if is_functorch_wrapped_tensor(tensor) else tensor.data_ptr()


class Watch:
    """Looks at a model's first forward pass with gradients for what would undo the protection.

    Args:
        model: whose forward.
        protection: what is going on.
        say: called after that pass with what was found, names with a phrase each: layers whose weights are used in a
            way that no projector covers, and buffers that moved.
    """

    def __init__(self, model: nn.Module, protection: Protection, say: Say) -> None:
        self.model, self.protection, self.say = model, protection, say
        self.found: dict[tuple[str, str], None] = {}
        self.before: dict[str, tuple[int, int, int]] | None = None
        self.originals: Mapping[int, Tensor] = {}  # the layers' parameters, by their ids and those of copies
        self.trained: set[int] = set()
        self.is_over = False
        self.open = ExitStack()
        self.open.enter_context(torch.compiler.set_stance("force_eager"))  # so that calls can be seen

    def begin(self) -> None:
        """The model's forward begins."""
        if self.before is None and torch.is_grad_enabled() and self.protection.is_on:
            self.before = self._state()
            layers = [project.layer for project in self.protection.projectors.values()]
            uses = Uses(layers, self._applied, self._used)
            self.originals = uses.alike
            self.trained = {id(p) for p in self.originals.values() if p.requires_grad}
            self.open.enter_context(uses)

    def end(self) -> None:
        """It is over."""
        if self.before is None or self.is_over:
            return
        self.close()
        for name, state in self._state().items():
            owner = self.model.get_submodule(name.rpartition(".")[0])
            if self.before.get(name) != state and not hasattr(owner, "track_running_stats"):  # of those another warns
                self.found[name, f"{name} is changed by the forward pass itself"] = None
        self.say(list(self.found))

    def close(self) -> None:
        """Look no more."""
        self.open.close()
        self.is_over = True

    def _state(self) -> dict[str, tuple[int, int, int]]:
        """What changes where a buffer, or a parameter of a protected layer, is given other values."""
        mine = {id(p) for project in self.protection.projectors.values() for p in project.layer.parameters}
        parameters = [(name, p) for name, p in self.model.named_parameters() if id(p) in mine]
        tensors = (*parameters, *self.model.named_buffers())
        return {name: (id(tensor), _place(tensor), tensor._version) for name, tensor in tensors}

    def _used(self, layer: Layer, function: str) -> None:
        self.found[layer.name, used_otherwise(layer, function)] = None

    def _applied(self, layer: Layer, _function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        given = {id(self.originals.get(id(x), x)) for x in arguments.values() if getattr(x, "requires_grad", False)}
        if torch.is_grad_enabled() and not self.protection.projectors[layer.name].is_idle and given & self.trained:
            # Where its application was seen before, substitutes are in its parameters' places.
            what = f"{layer.name or 'the model'} is applied where update() has not seen it applied"
            self.found[layer.name, what] = None


class _Hook:
    """A forward hook that calls something; with a copied or pickled module it is one that does nothing."""

    def __init__(self, call: Callable[[], None]) -> None:
        self.call = torch.compiler.disable(call)

    def __call__(self, *_: Any) -> None:
        self.call()

    def __reduce__(self):
        return _Hook, (_nothing,)


def _nothing() -> None:
    pass


@contextmanager
def watching(model: nn.Module, protection: Protection, say: Say) -> Iterator[None]:
    """Within this context a `Watch` looks at the model's first forward pass."""
    watch = Watch(model, protection, say)
    begin = model.register_forward_pre_hook(_Hook(watch.begin))
    end = model.register_forward_hook(_Hook(watch.end), always_call=True)
    try:
        yield
    finally:
        watch.close()
        begin.remove()
        end.remove()
