"""What a memory warns of: what can still move old tasks' outputs, each as a sentence."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import nn

from gradproj.layers import Layer, Selection, kept_modules
from gradproj.layers.find import kind_of, unknown_weight
from gradproj.optimizers import leaves_gradients, unprojected
from gradproj.projection import LayerProjector


def what_can_forget(
    model: nn.Module, exclude: Selection, include: Selection | None, unprotected: Sequence[str]
) -> Iterator[str]:
    """Parameters that learn without protection, and statistics that go on moving, as far as nobody excluded them.

    Args:
        model: whose.
        exclude, include: as the memory's.
        unprotected: the names of trained parameters that are neither protected nor frozen.
    """
    kept = kept_modules(model, exclude, include)
    refused = {  # excluded, but because they had to be
        inner
        for name, module in model.named_modules()
        if name not in kept and (kind := kind_of(module)) and unknown_weight(module, kind)
        for inner, _ in module.named_modules(prefix=name)
    }
    inside = [name for name in unprotected if (owner := name.rpartition(".")[0]) in kept or owner in refused]
    tied = {id(p) for module in kept.values() for p in module.parameters(recurse=False)}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    inside += [name for name in unprotected if name not in inside and id(parameters[name]) in tied]
    if inside:
        yield (
            f"not protected, so old tasks may be forgotten through them: {', '.join(inside)}; freeze them "
            "(requires_grad_(False), or protect(freeze_unprotected=True)) or exclude their modules"
        )
    moving = [
        name for name, module in kept.items() if getattr(module, "track_running_stats", False) and module.training
    ]
    if moving:
        yield (
            f"running statistics of {', '.join(moving)} go on moving, and with them old tasks' outputs; use "
            "track_running_stats=False, or keep these modules in eval mode after the first task"
        )


def used_otherwise(layer: Layer, function: str) -> str:
    """That a layer's weight goes into a function which is not known to apply it."""
    return f"the weight of {layer.name or 'the model'} is also used by {function}, which is not projected"


def what_rounds(layers: Mapping[str, Layer]) -> str | None:
    """That weights are in half precision, where some are."""
    halves = [layer.dtype for layer in layers.values() if layer.dtype in (torch.bfloat16, torch.float16)]
    if not halves:
        return None
    dtype, size = str(halves[0]).removeprefix("torch."), torch.finfo(halves[0]).eps / 2
    return (
        f"the weights of {len(halves)} layers are {dtype}: each step rounds them by up to {size:.1g} of "
        "themselves, which moves old outputs however gradients are projected (verify() measures it); keep "
        "float32 weights and train under autocast"
    )


def what_steps_past(
    optimizer: torch.optim.Optimizer, projectors: Collection[LayerProjector], has_gradients: bool
) -> Iterator[str]:
    """What of an optimiser's first step would move protected weights otherwise than orthogonally to their bases.

    Args:
        optimizer: before that step; one whose updates are not projected.
        projectors: through which gradients must have gone.
        has_gradients: whether what parameters hold now are the gradients of that step.
    """
    if reason := leaves_gradients(optimizer, projectors):
        yield (
            f"{type(optimizer).__name__} trains protected layers, and {reason}: projected gradients alone do not hold "
            "old tasks then; give it to protect(optimizer)"
        )
    for name in unprojected(projectors) if has_gradients else ():
        yield (
            f"a gradient of {name or 'the model'} came past its projection, or is left from before: old tasks may be "
            "forgotten through it"
        )
