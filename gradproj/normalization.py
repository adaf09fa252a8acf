"""Normalisation layers: what of them is frozen, and BatchNorm's statistics over a task's whole training set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradproj.layers import Selection, kept_modules

Normalization = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

Statistics = dict[str, tuple[Tensor, Tensor]]  # by module name: mean and variance (channels,)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """A model's BatchNorm modules by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


@torch.no_grad()
def training_statistics(model: nn.Module, forward: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> Statistics:
    """Mean and variance of each BatchNorm's inputs over many batches, each normalised by its own statistics.

    Args:
        model: put into eval mode, as at test: without dropout.
        forward: runs the model on one batch.
        batches: the training images.
    """
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    counts: dict[str, int] = {}

    def listen(name: str, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0].double().transpose(0, 1).flatten(1)  # (channels, batch · positions)
        first, second = sums.get(name, (0.0, 0.0))
        sums[name] = (first + values.sum(1), second + values.square().sum(1))
        counts[name] = counts.get(name, 0) + values.shape[1]

    model.eval()
    with ExitStack() as hooks:
        for name, module in batch_norms(model).items():
            hooks.enter_context(module.register_forward_pre_hook(partial(listen, name)))
        for batch in batches:
            forward(batch)
    statistics = {}
    for name, (first, second) in sums.items():
        mean = first / counts[name]
        statistics[name] = (mean.float(), (second / counts[name] - mean.square()).clamp(min=0).float())
    return statistics


@contextmanager
def fixed_statistics(model: nn.Module, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within this context BatchNorm normalises by the given statistics instead of the batch's."""
    modules = batch_norms(model)

    def normalise(module: Any, mean: Tensor, variance: Tensor, inputs: Tensor) -> Tensor:
        mean, variance = mean.to(inputs), variance.to(inputs)
        return F.batch_norm(inputs, mean, variance, module.weight, module.bias, training=False, eps=module.eps)

    for name, (mean, variance) in statistics.items():
        modules[name].forward = partial(normalise, modules[name], mean, variance)
    try:
        yield
    finally:
        for name in statistics:
            del modules[name].forward


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this context the parameters get no gradient; those that got none before get none afterwards."""
    changed = [p for p in parameters if p.requires_grad]
    for p in changed:
        p.requires_grad_(False)
        p.grad = None  # an optimiser would go on using it
    try:
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)


def is_normalization(module: nn.Module) -> bool:
    """Whether a module scales and shifts what it has normalised: torch's own, or one that is called so and looks so."""
    own = list(module.parameters(recurse=False))
    return isinstance(module, Normalization) or (
        "norm" in type(module).__name__.lower() and bool(own) and all(p.ndim == 1 for p in own)
    )


def normalization_parameters(
    model: nn.Module, exclude: Selection = (), include: Selection | None = None
) -> list[nn.Parameter]:
    """Scales and shifts of a model's normalisation layers, of those modules that are selected."""
    modules = kept_modules(model, exclude, include).values()
    return [p for module in modules if is_normalization(module) for p in module.parameters(recurse=False)]
