"""Interference activations ΔW x: how far later tasks moved an old task's layer outputs (paper Sec. 6, Figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.batches import in_eval_mode
from gradproj.layers import Layer
from gradproj.layers.uses import Uses, plain_paths, read_inputs
from gradproj.snapshot import difference, parameter_names

# Bins of ΔW x, in units of the root mean square of the layer's old output W x; the outer ones take all beyond.
EDGES = np.linspace(-0.5, 0.5, 102)


@torch.no_grad()
def interference(
    model: nn.Module, layers: Mapping[str, Layer], before: Mapping[str, Tensor], forward: Callable[[], Any]
) -> dict[str, dict[str, Any]]:
    """Compare a model's layers with what they were when an old task had just been learned, on that task's own inputs.

    Args:
        model: as it is now; left so.
        layers: the layers to compare.
        before: the model's state_dict after the old task; the inputs x of its layers are those of that network.
        forward: runs the model on images of the old task.
    Returns:
        by layer name: "ratio", the root mean square of ΔW x over that of W x, and "counts", the histogram of ΔW x over
        the latter, in the bins of EDGES. Biases count as weights of a constant input.
    """
    now = {name: value.clone() for name, value in model.state_dict().items()}
    names = parameter_names(model)
    change = {name: difference(layer, names, now, before) for name, layer in layers.items()}
    moved: dict[str, list[Tensor]] = {name: [] for name in layers}
    usual: dict[str, list[Tensor]] = {name: [] for name in layers}

    def compare(layer: Layer, function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        read_inputs(layer, function, arguments)  # refused where they cannot be read
        # Not the module's output: a method may have a hook that changes that, as HAT's gates do.
        moved[layer.name] += [y.flatten() for y in layer.outputs(function, arguments, *change[layer.name])]
        usual[layer.name] += [y.flatten() for y in layer.outputs(function, arguments, *layer.parameters)]

    try:
        model.load_state_dict(before)
        with in_eval_mode(model), plain_paths(), Uses(layers.values(), compare):
            forward()
    finally:
        model.load_state_dict(now)
    return {name: _compared(torch.cat(moved[name]), torch.cat(usual[name])) for name in layers if moved[name]}


def _compared(moved: Tensor, usual: Tensor) -> dict[str, Any]:
    """Ratio and histogram of ΔW x against W x."""
    moved, scale = moved.double(), usual.double().square().mean().sqrt()
    relative = (moved / scale).nan_to_num(nan=0.0).clamp(EDGES[0], EDGES[-1])
    return {
        "ratio": float((moved.square().mean().sqrt() / scale).nan_to_num(nan=0.0)),
        "counts": np.histogram(relative.cpu().numpy(), EDGES)[0].tolist(),
    }
