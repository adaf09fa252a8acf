"""Which units feed which layers of a model, read from the autograd graph of one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.errors import InputError
from gradproj.layers import Layer

# Normalisations that treat each channel by itself; others would carry changes of one unit over to the next.
PerChannel = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
Node = Any  # of the autograd graph


def find_units(
    model: nn.Module, layers: Mapping[str, Layer], forward: Callable[[], Any]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The units of each layer: its outputs, after the normalisation that they go through at once, if any.

    Args:
        model: put into eval mode.
        layers: whose units are meant, by name.
        forward: runs the model on a few images.
    Returns:
        norms: by layer name, the module name of its normalisation, where it has one.
        sources: by layer name, the layers whose units feed it, with no layer between; none if it reads the images.
    Raises:
        InputError: a layer did not run, or its inputs cannot be told apart by unit.
    """
    made: dict[Node, str] = {}  # the layer whose units are a node's output
    norms: dict[str, str] = {}
    sources: dict[str, list[str]] = {}

    def before_layer(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sources[name] = sorted(feeding(args[0].grad_fn, made))

    def after_layer(name: str, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        made[output.grad_fn] = name

    def after_norm(norm: str, _module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        name = made.get(args[0].grad_fn)
        if name is not None:
            norms[name] = norm
            made[output.grad_fn] = name

    with ExitStack() as hooks, torch.enable_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.module.register_forward_pre_hook(partial(before_layer, name)))
            hooks.enter_context(layer.module.register_forward_hook(partial(after_layer, name)))
        for name, module in model.named_modules():
            if isinstance(module, PerChannel):
                hooks.enter_context(module.register_forward_hook(partial(after_norm, name)))
        model.eval()
        forward()
    for name, layer in layers.items():
        if name not in sources:
            raise InputError(f"layer {name} did not run in the forward pass, so it is unknown what feeds it")
        units = {len(layers[source].module.weight) for source in sources[name]}
        if len(units) > 1 or any(layer.module.weight.shape[1] % n for n in units):
            raise InputError(f"the inputs of layer {name} cannot be divided among the units of {sources[name]}")
    return norms, sources


def feeding(node: Node, made: Mapping[Node, str]) -> set[str]:
    """Walk the graph back from a node, up to the nearest units on every path; returns their layers."""
    nodes, visited, found = [node], {None}, set()
    while nodes:
        node = nodes.pop()
        if node in made:
            found.add(made[node])
        elif node not in visited:
            visited.add(node)
            nodes += [before for before, _ in node.next_functions]
    return found
