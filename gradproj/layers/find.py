"""Which modules of a model are layers that can be protected."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from gradproj.errors import InputError
from gradproj.layers.base import Layer
from gradproj.layers.convolution import ConvolutionLayer
from gradproj.layers.linear import LinearLayer

KINDS: tuple[type[Layer], ...] = (LinearLayer, ConvolutionLayer)


def find_layers(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, Layer]:
    """Every layer of a model that can be protected by name, in the order of definition.

    Args:
        model: any module.
        exclude: names of modules to leave out, with all that is inside them.
    Raises:
        InputError: an excluded name is not a module of the model; a weight also belongs to another module, or is made
            of other parameters, so that it can move although its layer's gradient is projected.
    """
    modules = kept_modules(model, exclude)
    attentions = [m for m in modules.values() if isinstance(m, nn.MultiheadAttention)]
    uncalled = {id(m) for attention in attentions for m in attention.modules()}  # it uses their weights itself
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append(name)
    layers = {}
    for name, module in modules.items():
        kind = next((kind for kind in KINDS if isinstance(module, kind.modules)), None)
        if kind is None or id(module) in uncalled:
            continue
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            raise InputError(f"layer {name} makes its weight of other parameters; exclude it, or remove that first")
        others = [owner for owner in owners[id(module.weight)] if owner != name]
        if others:
            raise InputError(f"layer {name} shares its weight with {', '.join(others)}; exclude both")
        layers[name] = kind(name, module)
    return layers


def kept_modules(model: nn.Module, exclude: Iterable[str]) -> dict[str, nn.Module]:
    """A model's modules by name, but for some and all that is inside them.

    Raises:
        InputError: an excluded name is not a module of the model.
    """
    modules = dict(model.named_modules())
    excluded: set[str] = set()
    for name in exclude:
        if name not in modules:
            raise InputError(f"exclude names {name!r}, which is not a module of {type(model).__name__}")
        excluded.update(inner for inner, _ in modules[name].named_modules(prefix=name))
    return {name: module for name, module in modules.items() if name not in excluded}
