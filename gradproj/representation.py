"""A model's layer inputs as representation matrices, read by hooks (paper Sec. 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.errors import InputError
from gradproj.layers import Layer

# Entries of one block of columns: blocks bound the memory that unfolding takes, 128 MiB in float64.
BLOCK_ENTRIES = 2**24


class Representation:
    """One representation matrix R (d, n), as its columns while n < d and as R Rᵀ (d, d) in float64 from then on.

    Either form decides the subspace exactly, and none takes more than d² entries, however many columns are added.

    Args:
        d: size of a column.
        keep_columns: hold them all as they are, for what R Rᵀ does not say.

    Attributes:
        columns: R, in the dtype it came in, while n < d; then None.
        gram: R Rᵀ from then on; None before.
    """

    def __init__(self, d: int, keep_columns: bool = False) -> None:
        self.d, self.n, self.keep_columns = d, 0, keep_columns
        self.columns: Tensor | None = None
        self.gram: Tensor | None = None

    @property
    def is_finite(self) -> bool:
        """Whether all columns added so far are."""
        return bool((self.columns if self.gram is None else self.gram).isfinite().all())

    @property
    def outer(self) -> Tensor:
        """R Rᵀ (d, d) float64, whichever form is held."""
        return self.gram if self.columns is None else self.columns.double() @ self.columns.double().T

    def energies(self, directions: Tensor) -> Tensor:
        """‖mᵀ R‖² (k,) float64, for each column m of `directions` (d, k): the energy of the inputs along it."""
        if self.columns is None:
            return (directions * (self.gram @ directions)).sum(0).clamp(min=0)
        return (directions.T @ self.columns.double()).square().sum(1)

    def add(self, columns: Tensor) -> Representation:
        """Append columns (d, m); returns itself."""
        self.n += columns.shape[1]
        if self.keep_columns or (self.gram is None and self.n < self.d):
            # A copy also of the first ones: they may be a view of an activation that the model changes in place.
            self.columns = columns.clone() if self.columns is None else torch.cat([self.columns, columns], dim=1)
            return self
        for block in (self.columns, *columns.split(max(1, BLOCK_ENTRIES // self.d), dim=1)):
            if block is not None:
                block = block.double()
                self.gram = block @ block.T if self.gram is None else self.gram.addmm_(block, block.T)
        self.columns = None
        return self


@torch.no_grad()
def representations(
    layers: Mapping[str, Layer],
    forward: Callable[[Any], Any],
    batches: Iterable[Any],
    samples: Mapping[str, int] | None = None,
    keep_columns: bool = False,
) -> dict[str, Representation]:
    """Run batches through a model and gather the inputs of its layers.

    Args:
        layers: the layers to listen to; the model must be in the mode (eval) whose inputs are wanted.
        forward: called once with each batch.
        batches: what `forward` takes.
        samples: by layer name, how many samples of each batch become columns, the first ones; all where unnamed.
        keep_columns: as for Representation.
    Returns:
        one Representation for each key of each layer.
    Raises:
        InputError: a layer did not run.
    """
    samples = samples or {}
    gathered = {key: Representation(layer.input_size, keep_columns) for layer in layers.values() for key in layer.keys}

    def listen(layer: Layer) -> Callable[[nn.Module, tuple[Tensor, ...], dict[str, Any]], None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            inputs = (args[0] if args else kwargs["input"])[: samples.get(layer.name)]
            if not len(inputs):
                return
            # A few images at a time, since a patch repeats its pixels up to kernel-size times.
            entries = layer.input_size * layer.positions(inputs)
            for block in inputs.split(max(1, BLOCK_ENTRIES // entries)):
                for key, columns in zip(layer.keys, layer.columns(block), strict=True):
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
