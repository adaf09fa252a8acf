"""Scaled Gradient Projection (Saha and Roy, AAAI 2023, arXiv 2302.01386)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from engine.options import Options, flag
from gradproj.layers import Layer
from gradproj.projection import LayerProjector
from methods.gpm import GPM, Forward
from methods.parts.scaled import scaled_projector


class SGP(GPM):
    """GPM that gives way along the less important directions of its bases: G ← G - G M diag(λ) Mᵀ.

    M grows as in GPM. The importance λ_i in [0, 1] of a direction m_i grows with the energy of every task along it:
    with s_i = ‖m_iᵀ R‖ for the inputs R of the task just learned (of a new direction that is its singular value),

        λ'_i = (α + 1) s_i / (α s_i + max s),    λ_i ← min(1, λ_i + λ'_i) for old directions,  λ_i = λ'_i for new ones.

    The larger α, the nearer it is to GPM, which is λ = 1. Normalisation parameters are frozen as in GPM.

    α is the paper's on the two CIFAR-100 benchmarks. On permuted MNIST values from 2.5 to 25 validate alike
    (docs/successors.md), so that 10-split CIFAR-100's stays.

    Stores Σ (d·k + k) floats over the layers' bases.
    """

    name, title, place = "sgp", "SGP", 11
    flags = {
        "sgp_alpha": flag(10.0, "α of the importances; the larger, the more is held as firmly as in GPM", minimum=0)
    }
    defaults = {"cifar100": {"lr": 0.05, "lr_min": 5e-5}, "cifar100_superclass": {"sgp_alpha": 3.0}}
    embeddings, learns_when_full = False, True
    state = ("memory", "importance")

    def __init__(self, model: nn.Module, options: Options) -> None:
        super().__init__(model, options)
        self.importance = {key: basis.new_zeros(0) for key, basis in self.memory.bases.items()}  # λ (k,)

    def projector(self, layer: Layer) -> LayerProjector:
        return scaled_projector(layer, self.memory.bases, self.importance)

    def remember(self, t: int, forward: Forward, images: Iterable[Tensor], samples: dict[str, int]) -> None:
        gathered = self.memory.gather(forward, images, samples)
        self.memory.extend(gathered, self.epsilon(t))
        self.importance = {
            key: grown(self.importance[key], gathered[key].energies(basis).sqrt(), self.options.sgp_alpha)
            for key, basis in self.memory.bases.items()
        }


def grown(importance: Tensor, strength: Tensor, alpha: float) -> Tensor:
    """λ (k + r,) after a task.

    Args:
        importance: λ (k,) of the old directions.
        strength: s (k + r,) of the old and the new ones.
        alpha: α.
    """
    if not strength.any():  # the task does not use this layer
        return torch.cat([importance, strength[len(importance) :]])
    added = (alpha + 1) * strength / (alpha * strength + strength.max())
    added[: len(importance)] += importance
    return added.clamp(max=1)
