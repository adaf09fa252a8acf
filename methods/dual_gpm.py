"""DualGPM, the memory of Adaptive Plasticity Improvement (Liang and Li, CVPR 2023)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from engine.options import Options
from gradproj.subspace import orthogonal_complement
from methods.gpm import GPM, Forward


@dataclass(frozen=True)
class Half:
    """A subspace by the smaller of two orthonormal bases: M (d, k) of its own or N (d, d - k) of its complement."""

    columns: Tensor
    of_complement: bool

    @classmethod
    def of(cls, basis: Tensor) -> Half:
        """The subspace that the columns of M (d, k) span."""
        d, k = basis.shape
        return cls(basis, False) if k <= d - k else cls(orthogonal_complement(basis), True)

    def basis(self) -> Tensor:
        """An orthonormal basis M of the subspace itself."""
        return orthogonal_complement(self.columns) if self.of_complement else self.columns


class DualGPM(GPM):
    """GPM that stores, for each layer, the smaller of its basis M and a basis N of the complement.

    The two say the same, I - M Mᵀ = N Nᵀ, so training is GPM's; the memory grows until half of a layer's directions are
    taken, and shrinks from then on. While a task is learned or remembered, M is made from N.

    Stores Σ d·min(k, d - k) floats over the layers.
    """

    name, title, place = "dual_gpm", "DualGPM", 10
    embeddings = False
    state = ("halves", "others")

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.keep()

    def remember(self, t: int, forward: Forward, images: Iterable[Tensor], samples: dict[str, int]) -> None:
        super().remember(t, forward, images, samples)
        self.keep()

    def keep(self) -> None:
        """Store the bases, and go on from what is stored, as a continued run does."""
        self.halves = {key: Half.of(basis) for key, basis in self.memory.bases.items()}
        self.others = self.memory.state_dict() | {"bases": {}}
        self.restore()

    def restore(self) -> None:
        """Make the bases from what is stored."""
        bases = {key: half.basis() for key, half in self.halves.items()}
        self.memory.load_state_dict(self.others | {"bases": bases})

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        super().load_state_dict(saved)
        self.restore()
