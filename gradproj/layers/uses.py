"""Every application of layers' weights while a model runs, seen where torch's functions are called.

A layer's weight may be applied by its own module, by its parent (attention), or by a forward of the user's own after
padding, casting or rescaling. What counts is the call: F.linear(x, W, b) means that W sees x, whoever calls it.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from gradproj.errors import InputError
from gradproj.layers.base import Layer

# What gives the same numbers, perhaps in another precision or place, or without a gradient.
SAME_NUMBERS = {
    *(Tensor.to, Tensor.float, Tensor.half, Tensor.bfloat16, Tensor.double, Tensor.type, Tensor.type_as),
    *(Tensor.contiguous, Tensor.cpu, Tensor.cuda, Tensor.detach, torch.detach),
    Tensor.data.__get__,  # type: ignore[attr-defined]
}
# What makes a tensor like another, of other numbers, is called so.
LIKE = ("_like", "new_", "type_as", "expand_as", "view_as", "reshape_as")
NO_USE = ("grad", "requires_grad_")
OnUse = Callable[[Layer, Callable[..., Any], Mapping[str, Any]], None]
OnOther = Callable[[Layer, str], None]


class Uses(TorchFunctionMode):
    """A mode in which layers' weights are watched.

    Args:
        layers: whose weights.
        on_use: called before each application that is understood, with layer, function and arguments by name.
        on_other: called with layer and function name after each other call that makes something of a weight's numbers.

    Attributes:
        running: the modules whose forward is being executed, innermost last.
    """

    def __init__(self, layers: Iterable[Layer], on_use: OnUse, on_other: OnOther | None = None) -> None:
        super().__init__()
        self.on_use, self.on_other = on_use, on_other
        self.running: list[nn.Module] = []
        self.owners: dict[int, list[Layer]] = {}  # by id of a weight or bias, or of a copy of one
        self.alike: dict[int, Tensor] = {}  # by the same ids, the weight or bias itself
        for layer in layers:
            for parameter in layer.all_parameters:
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(layer)
                    self.alike[id(parameter)] = parameter
        self.copies: list[Tensor] = []  # kept, so that no other tensor gets their ids

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        watched = [x for x in _tensors(args, kwargs) if id(x) in self.owners]
        if not watched:
            return func(*args, **kwargs)
        understood = self._understood(func, args, kwargs)
        result = func(*args, **kwargs)
        if func in SAME_NUMBERS:
            first = next(iter((*args, *kwargs.values())))
            if isinstance(result, Tensor) and first is watched[0]:  # else only its kind is taken over
                self._follow(result, watched[0])
        elif self.on_other is not None and _is_made_of_numbers(func, result):
            for tensor in watched:
                if id(self.alike[id(tensor)]) not in understood and self.alike[id(tensor)].requires_grad:
                    for layer in self.owners[id(tensor)]:
                        self.on_other(layer, _name(func))
        return result

    def _understood(self, func: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> set[int]:
        """Report the applications that a call is; returns the ids of the weights and biases that they explain."""
        explained: set[int] = set()
        layers = {id(layer): layer for x in _tensors(args, kwargs) for layer in self.owners.get(id(x), ())}
        for layer in layers.values():
            call = layer.functions.get(func)
            if call is None:
                continue
            arguments = {**dict(zip(call.arguments, args, strict=False)), **kwargs}
            # Under protection substitutes, which nobody watches, may stand in the places of the layer's parameters.
            given = [self.alike.get(id(x), x) for x in map(arguments.get, (call.weight, call.bias))]
            weight, bias = layer.all_parameters
            known = given[0] is weight and (bias is None or arguments.get(call.bias) is None or given[1] is bias)
            if known and layer.understands(arguments):
                self.on_use(layer, func, arguments)
                explained |= {id(weight), id(bias)}
        return explained

    def _follow(self, copy: Tensor, original: Tensor) -> None:
        if id(copy) not in self.owners:
            self.copies.append(copy)
            self.owners[id(copy)] = self.owners[id(original)]
            self.alike[id(copy)] = self.alike[id(original)]

    def _left(self) -> None:
        if self.running:  # a module may have been entered before this mode was
            self.running.pop()

    def __enter__(self):
        self._filters = warnings.catch_warnings()
        self._filters.__enter__()
        # Compiled models warn that hooks on all modules see their wrapper too, which is no harm here.
        warnings.filterwarnings("ignore", "Using `torch.compile.* global hooks", UserWarning)
        self._hooks = (
            register_module_forward_pre_hook(lambda module, _: self.running.append(module)),
            register_module_forward_hook(lambda *_: self._left(), always_call=True),
        )
        return super().__enter__()

    def __exit__(self, *error):
        for hook in self._hooks:
            hook.remove()
        self._filters.__exit__(*error)
        return super().__exit__(*error)


def read_inputs(layer: Layer, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Sequence[Tensor]:
    """A layer's inputs in a call of one of its functions; raises InputError where their values cannot be read."""
    inputs, name = layer.inputs(function, arguments), layer.name or "the model"
    for x in inputs:
        if x.is_nested:
            raise InputError(f"layer {name} is given a NestedTensor; give padded batches, and a mask of what counts")
        if x.layout is not torch.strided:
            raise InputError(f"layer {name} is given a sparse tensor; give dense ones")
        if is_functorch_wrapped_tensor(x):
            raise InputError(
                f"layer {name} runs within a transform of torch.func (vmap, grad, …), where its inputs cannot be read; "
                "give a forward that uses none"
            )
    return inputs


@contextmanager
def plain_paths() -> Iterator[None]:
    """Within this context models run as they do in training: compiled ones as written, attention without fused kernels
    for inference, which hide their weights and zero padded rows."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    compiled = "torch._dynamo" in sys.modules  # else nothing is, and setting a stance would take seconds to import it
    try:
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _tensors(args: Any, kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among some arguments, also in lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value, {})


def _is_made_of_numbers(func: Callable[..., Any], result: Any) -> bool:
    """Whether a call on some tensors gave something of their numbers, and not of their shapes and kinds alone."""
    made = [x for x in _tensors((result,), {}) if x.is_floating_point() or x.is_complex()]
    name = _name(func)
    like = name in NO_USE or any(part in name for part in LIKE)
    return bool(made) and (not like or any(x.requires_grad for x in made))


def _name(func: Callable[..., Any]) -> str:
    """A function's name; of a property's getter, the property's."""
    name = getattr(func, "__name__", str(func))
    return getattr(getattr(func, "__self__", None), "__name__", name) if name == "__get__" else name
