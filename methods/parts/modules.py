"""What methods that work by hooks on modules need of a model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from gradproj.batches import in_eval_mode
from gradproj.errors import InputError
from gradproj.layers import Layer
from gradproj.layers.uses import Uses, plain_paths


def refuse_other_kinds(method: str, layers: Mapping[str, Layer], kinds: Collection[type[Layer]]) -> None:
    """Raise InputError where layers are of kinds that a method does not know."""
    others = [f"{name} ({layer.kind})" for name, layer in layers.items() if type(layer) not in kinds]
    if others:
        known = ", ".join(kind.kind for kind in kinds)
        raise InputError(f"{method} is for layers of the kinds {known}; not for {', '.join(others)}")


def refuse_other_uses(method: str, model: nn.Module, layers: Mapping[str, Layer], forward: Callable[[], Any]) -> None:
    """Raise InputError where a layer's weight is applied elsewhere than in its module's forward, which hooks miss.

    Args:
        method: its name.
        model: whose layers they are; run in eval mode.
        layers: by name.
        forward: runs the model on a few images.
    """
    elsewhere: set[str] = set()

    def use(layer: Layer, *_: Any) -> None:
        if uses.running[-1] is not layer.module:
            elsewhere.add(layer.name)

    with torch.no_grad(), in_eval_mode(model), plain_paths(), Uses(layers.values(), use) as uses:
        forward()
    if elsewhere:
        raise InputError(
            f"{method} sees what layers compute in their own forward; weights of {', '.join(sorted(elsewhere))} are "
            "applied elsewhere, as by a functional call or inside an attention"
        )
