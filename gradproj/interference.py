"""Interference activations ΔW x: how far later tasks moved an old task's layer outputs (paper Sec. 6, Figure 3)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.layers import Layer

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
    change = {name: [_change(part, now, before, name) for part in ("weight", "bias")] for name in layers}
    modes = {module: module.training for module in model.modules()}
    found: dict[str, dict[str, Any]] = {}

    def compare(layer: Layer) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            moved = layer.apply(args[0], *change[layer.name]).double()
            # Not the module's output: a method may have a hook that changes that, as HAT's gates do.
            usual = layer.apply(args[0], *layer.parameters).double().square().mean().sqrt()
            relative = (moved / usual).nan_to_num(nan=0.0).clamp(EDGES[0], EDGES[-1])
            found[layer.name] = {
                "ratio": float((moved.square().mean().sqrt() / usual).nan_to_num(nan=0.0)),
                "counts": np.histogram(relative.cpu().numpy(), EDGES)[0].tolist(),
            }

        return hook

    try:
        with ExitStack() as hooks:
            for layer in layers.values():
                hooks.enter_context(layer.module.register_forward_pre_hook(compare(layer)))
            model.load_state_dict(before)
            model.eval()
            forward()
    finally:
        model.load_state_dict(now)
        for module, mode in modes.items():
            module.training = mode
    return found


def _change(part: str, now: Mapping[str, Tensor], before: Mapping[str, Tensor], layer: str) -> Tensor | None:
    name = f"{layer}.{part}"
    return now[name] - before[name].to(now[name]) if name in now else None
