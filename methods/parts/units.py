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
IMAGES = ""  # in the place of a layer that feeds others


def find_units(
    model: nn.Module, layers: Mapping[str, Layer], images: Tensor, forward: Callable[[Tensor], Any]
) -> tuple[dict[str, str], dict[str, list[str]]]:
    """The units of each layer: its outputs, after the normalisation that they go through at once, if any.

    Args:
        model: put into eval mode.
        layers: whose units are meant, by name.
        images: a few of them.
        forward: runs the model on images.
    Returns:
        norms: by layer name, the module name of its normalisation, where it has one.
        sources: by layer name, the layers whose units feed it, with no layer between, in any of its calls; none if it
            ever reads the images.
    Raises:
        InputError: a layer did not run, or its inputs cannot be told apart by unit.
    """
    with torch.enable_grad():
        images = images.detach().requires_grad_(images.is_floating_point()).clone()  # which gives them a node
    # The layer whose units are a node's output.
    made: dict[Node, str] = {} if images.grad_fn is None else {images.grad_fn: IMAGES}
    norms: dict[str, str] = {}
    feeders: dict[str, list[set[str]]] = {}  # of each call of each layer

    def before_layer(name: str, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        (inputs,) = (*args, *kwargs.values())
        feeders.setdefault(name, []).append(feeding(inputs.grad_fn, made))

    def after_layer(name: str, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        made[output.grad_fn] = name

    def after_norm(norm: str, _module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> None:
        (inputs,) = (*args, *kwargs.values())
        if name := made.get(inputs.grad_fn):
            norms[name] = norm
            made[output.grad_fn] = name

    with ExitStack() as hooks, torch.enable_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.module.register_forward_pre_hook(partial(before_layer, name), with_kwargs=True))
            hooks.enter_context(layer.module.register_forward_hook(partial(after_layer, name)))
        for name, module in model.named_modules():
            if isinstance(module, PerChannel):
                hooks.enter_context(module.register_forward_hook(partial(after_norm, name), with_kwargs=True))
        model.eval()
        forward(images)
    sources = {
        name: sorted(set.union(*calls)) if all(call and IMAGES not in call for call in calls) else []
        for name, calls in feeders.items()
    }
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
