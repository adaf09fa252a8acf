"""What was seen of a task: a layer's representation matrix, or the rows of a table (paper Sec. 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from gradproj.layers.base import BLOCK_ENTRIES

STRIP = 512  # rows of R Rᵀ that are made at once in float32


class Representation:
    """One representation matrix R (d, n), as its columns while n < d and as R Rᵀ (d, d) in float64 from then on.

    Either form decides the subspace exactly, and none takes more than d² entries, however many columns are added.

    Args:
        d: inputs of the layer.
        product_dtype: of the products that R Rᵀ is summed from; in float32 they take half the time and cost 1e-7 of it.
        keep_columns: hold all columns as they are, for what R Rᵀ does not say.
        unit: bring the largest entry of each column into [0.5, 1) by a power of two, which changes no span and rounds
            nothing: for ε = 1, where each column counts, however short beside others.

    Attributes:
        columns: R, in the dtype it came in, while n < d; then None.
        gram: R Rᵀ from then on; None before.
    """

    def __init__(
        self, d: int, product_dtype: torch.dtype = torch.float64, keep_columns: bool = False, unit: bool = False
    ) -> None:
        self.d, self.n, self.product_dtype, self.keep_columns, self.unit = d, 0, product_dtype, keep_columns, unit
        self.columns: Tensor | None = None
        self.gram: Tensor | None = None

    @property
    def held(self) -> Tensor:
        """Whichever form is kept."""
        held = self.columns if self.gram is None else self.gram
        if held is None:
            raise ValueError("nothing was added to this representation")
        return held

    @property
    def is_finite(self) -> bool:
        """Whether all columns added so far are."""
        return bool(self.held.isfinite().all())

    @property
    def energy(self) -> float:
        """‖R‖²."""
        return float(self.held.double().square().sum() if self.gram is None else self.gram.trace())

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.held.device

    def add(self, columns: Tensor) -> Representation:
        """Append columns (d, m); returns itself."""
        self.n += columns.shape[1]
        if self.unit:
            columns = columns.to(torch.promote_types(columns.dtype, torch.float32))
            exponents = torch.frexp(columns.abs().amax(0)).exponent
            most = exponents.clamp(-120, 120)  # what one power of two in float32 takes
            columns = torch.ldexp(torch.ldexp(columns, -most), most - exponents)
        if self.keep_columns or (self.gram is None and self.n < self.d):
            # A copy also of the first ones: they may be a view of an activation that the model changes in place.
            self.columns = columns.clone() if self.columns is None else torch.cat([self.columns, columns], dim=1)
            return self
        for block in (self.columns, *columns.split(max(1, BLOCK_ENTRIES // self.d), dim=1)):
            if block is not None:
                self._add_products(block)
        self.columns = None
        return self

    @property
    def outer(self) -> Tensor:
        """R Rᵀ (d, d) float64, whichever form is kept."""
        if self.gram is not None:
            return self.gram
        columns = self.held.double()
        return columns @ columns.T

    def energies(self, directions: Tensor) -> Tensor:
        """‖mᵀ R‖² (k,) float64, for each column m of `directions` (d, k): the energy of the inputs along it."""
        if self.gram is None:
            return (directions.T @ self.held.double()).square().sum(1)
        return (directions * (self.gram @ directions)).sum(0).clamp(min=0)

    def _add_products(self, block: Tensor) -> None:
        block = block.to(self.product_dtype)
        if self.product_dtype == torch.float64:
            self.gram = block @ block.T if self.gram is None else self.gram.addmm_(block, block.T)
            return
        if self.gram is None:
            self.gram = torch.zeros(self.d, self.d, dtype=torch.float64, device=block.device)
        for start in range(0, self.d, STRIP):  # a matrix product knows nothing of symmetry: make one half of it
            strip = (block[start : start + STRIP] @ block[start:].T).double()
            self.gram[start : start + STRIP, start:] += strip
            self.gram[start + STRIP :, start : start + STRIP] += strip[:, STRIP:].T


class SeenRows:
    """The rows of a table that were looked up.

    Args:
        d: rows of the table.

    Attributes:
        n: indices added so far.
        seen: (d,) whether a row was looked up.
    """

    def __init__(self, d: int) -> None:
        self.d, self.n = d, 0
        self.seen = torch.zeros(d, dtype=torch.bool)
        self.is_finite = True

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.seen.device

    def add(self, indices: Tensor) -> SeenRows:
        """Note indices (m,); returns itself."""
        self.n += len(indices)
        self.seen = self.seen.to(indices.device)
        self.seen[indices] = True
        return self
