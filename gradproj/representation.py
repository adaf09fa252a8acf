"""A model's layer inputs as representation matrices, read by hooks from any Linear or convolution (paper Sec. 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from gradproj.errors import InputError

Convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# Entries of one block of patches: blocks bound the memory that unfolding takes, 128 MiB in float64.
BLOCK_ENTRIES = 2**24


@dataclass(frozen=True)
class Layer:
    """A layer whose weights can be protected: y = W x + b on rows, or on the patches of a convolution.

    A convolution in groups is as many layers side by side, so it has one subspace for each group. A bias sees the
    constant 1 as one more input.
    """

    name: str
    module: nn.Module

    @property
    def groups(self) -> int:
        return getattr(self.module, "groups", 1)

    @property
    def input_size(self) -> int:
        """d: inputs that one output unit sees, a bias's constant 1 included."""
        return self.module.weight[0].numel() + (self.module.bias is not None)

    @property
    def keys(self) -> list[str]:
        """The names of the layer's subspaces: its own, or one for each group."""
        return [self.name] if self.groups == 1 else [f"{self.name}[{g}]" for g in range(self.groups)]


def find_layers(model: nn.Module, exclude: Iterable[str] = ()) -> dict[str, Layer]:
    """Every Linear and convolution of a model by name, in the order of definition.

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
        if not isinstance(module, (nn.Linear, *Convolution)) or id(module) in uncalled:
            continue
        if parametrize.is_parametrized(module) or "weight" not in module._parameters:
            raise InputError(f"layer {name} makes its weight of other parameters; exclude it, or remove that first")
        others = [owner for owner in owners[id(module.weight)] if owner != name]
        if others:
            raise InputError(f"layer {name} shares its weight with {', '.join(others)}; exclude both")
        layers[name] = Layer(name, module)
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


def input_columns(layer: Layer, inputs: Tensor) -> list[Tensor]:
    """The columns of the representation matrix that some inputs add, for each group of a layer.

    Args:
        layer: a Linear, whose columns are rows of its input, or a convolution, whose columns are patches.
        inputs: what the layer's forward receives, batch first; of a Linear (..., d).
    Returns:
        one (d, n) tensor a group.
    """
    module = layer.module
    if isinstance(module, nn.Linear):
        columns = [inputs.reshape(-1, inputs.shape[-1]).T]
    else:
        columns = list(patches(module, inputs))
    if module.bias is not None:
        columns = [torch.cat([c, c.new_ones(1, c.shape[1])]) for c in columns]
    return columns


def patches(conv: nn.Module, inputs: Tensor) -> Tensor:
    """The patches of `inputs` (batch, channels, *size) that a convolution sees, as (groups, d, batch · positions)."""
    padding = conv._reversed_padding_repeated_twice  # also resolves padding="same"
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = F.pad(inputs, padding, mode=mode)
    for axis, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(axis + 2, dilation * (size - 1) + 1, stride)[..., ::dilation]
    batch, channels = x.shape[:2]
    dims = len(conv.kernel_size)
    x = x.reshape(batch, conv.groups, channels // conv.groups, -1, *conv.kernel_size)  # (b, g, c, positions, *kernel)
    order = (1, 2, *range(4, 4 + dims), 0, 3)  # (g, c, *kernel, b, positions)
    return x.permute(order).reshape(conv.groups, x[0, 0, :, 0].numel(), -1)


class Representation:
    """One representation matrix R (d, n), as its columns while n < d and as R Rᵀ (d, d) in float64 from then on.

    Either form decides the subspace exactly, and none takes more than d² entries, however many columns are added.
    """

    def __init__(self, d: int) -> None:
        self.d, self.n = d, 0
        self.columns: Tensor | None = None
        self.gram: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        """Whether all columns added so far are."""
        return bool((self.columns if self.gram is None else self.gram).isfinite().all())

    def add(self, columns: Tensor) -> None:
        """Append columns (d, m)."""
        self.n += columns.shape[1]
        if self.gram is None and self.n < self.d:
            # A copy also of the first ones: they may be a view of an activation that the model changes in place.
            self.columns = columns.clone() if self.columns is None else torch.cat([self.columns, columns], dim=1)
            return
        for block in (self.columns, *columns.split(max(1, BLOCK_ENTRIES // self.d), dim=1)):
            if block is not None:
                block = block.double()
                self.gram = block @ block.T if self.gram is None else self.gram.addmm_(block, block.T)
        self.columns = None


@torch.no_grad()
def representations(
    layers: Mapping[str, Layer],
    forward: Callable[[Any], Any],
    batches: Iterable[Any],
    samples: Mapping[str, int] | None = None,
) -> dict[str, Representation]:
    """Run batches through a model and gather the inputs of its layers.

    Args:
        layers: the layers to listen to; the model must be in the mode (eval) whose inputs are wanted.
        forward: called once with each batch.
        batches: what `forward` takes.
        samples: by layer name, how many samples of each batch become columns, the first ones; all where unnamed.
    Returns:
        one Representation for each key of each layer.
    Raises:
        InputError: a layer did not run.
    """
    samples = samples or {}
    gathered = {key: Representation(layer.input_size) for layer in layers.values() for key in layer.keys}

    def listen(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            inputs = (args[0] if args else kwargs["input"])[: samples.get(layer.name)]
            if not len(inputs):
                return
            # A few images at a time, since a patch repeats its pixels up to kernel-size times.
            positions = inputs[0, ..., 0] if isinstance(layer.module, nn.Linear) else inputs[0, 0]  # at stride 1
            entries = layer.input_size * positions.numel()
            for block in inputs.split(max(1, BLOCK_ENTRIES // entries)):
                for key, columns in zip(layer.keys, input_columns(layer, block), strict=True):
                    gathered[key].add(columns)

        return hook

    with ExitStack() as hooks:
        for layer in layers.values():
            hooks.enter_context(layer.module.register_forward_pre_hook(listen(layer), with_kwargs=True))
        n_batches = 0
        for batch in batches:
            forward(batch)
            n_batches += 1
    if not n_batches:
        raise InputError("there are no batches to read representations from; give at least one")
    for key, representation in gathered.items():
        if representation.n == 0:
            raise InputError(
                f"layer {key} did not run in the forward pass, so its inputs are unknown: exclude it, or give images; "
                "of a compiled model run the original"
            )
    return gathered
