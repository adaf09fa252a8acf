"""Which modules of a model are layers that can be protected."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from gradproj.errors import InputError
from gradproj.layers.attention import AttentionLayer
from gradproj.layers.base import Layer
from gradproj.layers.convolution import ConvolutionLayer, TransposedConvolutionLayer
from gradproj.layers.embedding import EmbeddingLayer, TiedEmbeddingLayer
from gradproj.layers.linear import LinearLayer, TransposedLinearLayer
from gradproj.layers.uses import Uses

KINDS: tuple[type[Layer], ...] = (
    *(LinearLayer, ConvolutionLayer, TransposedConvolutionLayer, AttentionLayer, TransposedLinearLayer, EmbeddingLayer),
)
Selection = str | nn.Module | Iterable[str | nn.Module]


def find_layers(model: nn.Module, exclude: Selection = (), include: Selection | None = None) -> dict[str, Layer]:
    """Every layer of a model that is trained and can be protected by name, in the order of definition.

    Args:
        model: any module.
        exclude: modules to leave out, with all that is inside them: names, patterns such as "heads.*", or modules.
        include: the only modules to look at, likewise.
    Raises:
        InputError: a name is not a module of the model; a weight also belongs to another module in a way that is not
            known, is made of other parameters, or is used by a forward of the user's own in a way that is not known, so
            that the network can forget although the layer's gradient is projected.
    """
    modules = kept_modules(model, exclude, include)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    layers: dict[str, Layer] = {}
    for name, module in modules.items():
        kind = kind_of(module)
        if kind is None or not any(p.requires_grad for p in module.parameters()):
            continue
        if fault := unknown_weight(module, kind):
            raise InputError(f"layer {name} {fault}")
        weight = module._parameters[kind.weight_name]
        others = [owner for owner in owners[id(weight)] if owner != name]
        if others:
            layer = tied_layer(owners[id(weight)], dict(model.named_modules()))
            if layer is None or any(other not in modules for other in others):
                shared = ", ".join(other or "the model itself" for other in others)
                raise InputError(f"layer {name} shares its weight with {shared}; exclude both")
            layers.setdefault(layer.name, layer)
        elif any((layer := kind(name, module)).trained):
            layers[name] = layer
    return layers


def kind_of(module: nn.Module) -> type[Layer] | None:
    """The kind of layer that a module is, if any."""
    return next((kind for kind in KINDS if kind.matches(module)), None)


def unknown_weight(module: nn.Module, kind: type[Layer]) -> str | None:
    """What is not known of a layer's weight; None if all is."""
    weight = module._parameters.get(kind.weight_name)
    if isinstance(weight, nn.UninitializedParameter):
        return "has no size yet; run the model once before"
    if weight is not None and weight.is_complex():
        return "has complex weights, which are not supported; exclude it"
    if parametrize.is_parametrized(module) or kind.weight_name not in module._parameters:
        return "makes its weight of other parameters; exclude it, or remove that first"
    if getattr(module, "max_norm", None) is not None:
        return "rescales its rows whenever it is used (max_norm), so they cannot be held; exclude it"
    if getattr(module, "sparse", False):
        return "has sparse gradients, which cannot be projected; use sparse=False, or exclude it"
    if has_plain_forward(module):
        return None
    if detail := foreign_use(module, kind):
        return f"({type(module).__name__}) has a forward of its own, {detail}; exclude it, or freeze it"
    return None


def has_plain_forward(module: nn.Module) -> bool:
    """Whether a module computes what torch's own class of its kind does, as far as its class can tell."""
    known = ("torch.nn.modules", "transformers.pytorch_utils")
    base: Any = next(c for c in type(module).__mro__ if c.__module__.startswith(known))
    methods = ("forward", "_conv_forward", "_output_padding")
    if any(getattr(type(module), name, None) is not getattr(base, name, None) for name in methods):
        return False
    replaced = vars(module).get("forward")
    # Hooks of accelerate wrap the forward and keep it beside.
    return replaced is None or getattr(vars(module).get("_old_forward"), "__func__", None) is base.forward


@torch.no_grad()
def foreign_use(module: nn.Module, kind: type[Layer]) -> str | None:
    """How a forward of the user's own uses a layer's weight otherwise than by a known call; None if it does not.

    It is tried on tensors without content (of torch's meta device), which costs and changes nothing.
    """
    if not issubclass(kind, (LinearLayer, ConvolutionLayer)) or issubclass(kind, TransposedLinearLayer):
        return "whose use of the weight is not known"
    substitutes: dict[str, Any] = {
        name: nn.Parameter(torch.empty_like(p, device="meta")) for name, p in module.named_parameters(recurse=False)
    } | {name: torch.empty_like(b, device="meta") for name, b in module.named_buffers(recurse=False)}
    inputs = torch.empty(probe_shape(module), dtype=next(module.parameters()).dtype, device="meta")
    uses: list[str] = []
    others: list[str] = []

    def run() -> None:
        probe = kind("", module)  # its parameters are the substitutes while these are in the module
        watch = Uses([probe], lambda *_: uses.append("call"), lambda _, function: others.append(function))
        with watch, torch.enable_grad():
            module.forward(inputs)

    before: dict[str, Any] = {name: module._parameters.get(name, module._buffers.get(name)) for name in substitutes}
    try:
        for name, tensor in substitutes.items():
            (module._parameters if name in module._parameters else module._buffers)[name] = tensor
        run()
    except Exception as error:  # whatever it needs beside an input, it is not known
        return f"which could not be tried ({type(error).__name__})"
    finally:
        for name, tensor in before.items():
            (module._parameters if name in module._parameters else module._buffers)[name] = tensor
    if others:
        return f"which uses the weight in {', '.join(dict.fromkeys(others))}"
    return None if uses else "which does not use the weight"


def probe_shape(module: Any) -> tuple[int, ...]:
    """The shape of a small input of a Linear or a convolution."""
    if isinstance(module, nn.Linear):
        return 2, module.in_features
    sizes = [2 * d * k + 1 for d, k in zip(module.dilation, module.kernel_size, strict=True)]
    return 2, module.in_channels, *sizes


def tied_layer(names: Sequence[str], modules: Mapping[str, nn.Module]) -> Layer | None:
    """The layer that some modules with one weight are, if they are embeddings, perhaps with one Linear."""
    plain = all((kind := kind_of(modules[n])) and unknown_weight(modules[n], kind) is None for n in names)
    tables = [n for n in names if isinstance(modules[n], nn.Embedding)]
    heads = [(n, module) for n in names if isinstance(module := modules[n], nn.Linear)]
    if not plain or not tables or len(heads) > 1 or len(tables) + len(heads) < len(names):
        return None
    shared = tuple(modules[n] for n in tables[1:])
    if heads:
        return TiedEmbeddingLayer(tables[0], modules[tables[0]], shared, *heads[0])
    return EmbeddingLayer(tables[0], modules[tables[0]], shared)


def kept_modules(model: nn.Module, exclude: Selection = (), include: Selection | None = None) -> dict[str, nn.Module]:
    """A model's modules by name: those that are included, but for those that are excluded.

    Raises:
        InputError: a name is not a module of the model.
    """
    excluded = selected(model, exclude, "exclude")
    chosen = None if include is None else selected(model, include, "include")
    return {
        name: module
        for name, module in model.named_modules()
        if name not in excluded and (chosen is None or name in chosen)
    }


def listed(selection: Selection | None) -> list[str | nn.Module]:
    """The names and modules of a selection, which may be one, several or none."""
    if selection is None:
        return []
    return [selection] if isinstance(selection, (str, nn.Module)) else list(selection)


def selected(model: nn.Module, selection: Selection, argument: str) -> set[str]:
    """The names of some modules and of all that is inside them."""
    modules = dict(model.named_modules())
    names: set[str] = set()
    for item in listed(selection):
        if isinstance(item, nn.Module):
            found = [name for name, module in modules.items() if module is item]
        elif item in modules:
            found = [item]
        else:
            found = fnmatch.filter(modules, item) if isinstance(item, str) and set(item) & set("*?[") else []
        if not found:
            shown = type(item).__name__ if isinstance(item, nn.Module) else repr(item)
            raise InputError(f"{argument} names {shown}, which is not a module of {type(model).__name__}")
        for name in found:
            names |= {inner for inner, _ in modules[name].named_modules(prefix=name)}
    return names
