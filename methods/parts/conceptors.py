"""Conceptors, soft projections onto what inputs use (Jaeger, arXiv 1403.3369), and their logic."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = 1 - 1e-7  # of a conceptor's eigenvalues: C / (I - C) must stay finite
TOLERANCE = 1e-6  # below it an eigenvalue is no direction; closer to 1 than it, a cosine is none between subspaces


class Conceptor(NamedTuple):
    """C = V diag(c) Vᵀ (d, d), symmetric with eigenvalues in [0, 1), those left out being 0.

    Attributes:
        vectors: V (d, k), orthonormal columns, float64.
        values: c (k,).
    """

    vectors: Tensor
    values: Tensor

    def above(self, least: float) -> Conceptor:
        """The eigenvalues of `least` or more, with the others 0."""
        kept = self.values >= least
        return Conceptor(self.vectors[:, kept], self.values[kept])


def conceptor(columns: Tensor, alpha: float, mu: float) -> Conceptor:
    """C = R̄ (R̄ + α⁻² I)⁻¹ of inputs, with R̄ = X Xᵀ / n and an aperture α that lets enough of them through.

    Args:
        columns: X (d, n).
        alpha: α to begin with; times 1.1 while less than a fraction μ of the inputs' lengths is left of them.
        mu: μ in [0, 0.9999], since rounding alone may keep all of the lengths out of reach: Σ ‖C x‖ >= μ Σ ‖x‖.
    """
    columns = columns.double()
    energies, vectors = torch.linalg.eigh(columns @ columns.T / columns.shape[1])
    energies = energies.clamp(min=0)
    along = (vectors.T @ columns).square()  # (d, n)
    wanted = mu * columns.norm(dim=0).sum()
    while True:
        values = energies / (energies + alpha**-2)
        if (values.square() @ along).sqrt().sum() >= wanted:
            return Conceptor(vectors, values.clamp(max=LARGEST))
        alpha *= 1.1


def disjunction(a: Conceptor, b: Conceptor) -> Conceptor:
    """A ∨ B: the conceptor of the inputs of both, whose correlations C (I - C)⁻¹ add up."""
    correlations = sum((c.vectors * (c.values / (1 - c.values))) @ c.vectors.T for c in (a, b))
    strengths, vectors = torch.linalg.eigh(correlations)
    strengths = strengths.clamp(min=0)
    return Conceptor(vectors, (strengths / (strengths + 1)).clamp(max=LARGEST))


def conjunction(a: Conceptor, b: Conceptor) -> Conceptor:
    """A ∧ B = W (Wᵀ (A⁺ + B⁺ - I) W)⁻¹ Wᵀ, W an orthonormal basis of range A ∩ range B; by decreasing eigenvalue.

    The pseudo-inverse of the whole A⁺ + B⁺ - I would be another matrix where the ranges differ.
    """
    a, b = a.above(TOLERANCE), b.above(TOLERANCE)
    turned, cosines, _ = torch.linalg.svd(a.vectors.T @ b.vectors, full_matrices=False)
    shared = a.vectors @ turned[:, cosines > 1 - TOLERANCE]  # W (d, m)
    inner = -torch.eye(shared.shape[1]).to(shared)
    for c in (a, b):
        along = c.vectors.T @ shared
        inner = inner + along.T @ (along / c.values[:, None])
    inverses, vectors = torch.linalg.eigh(inner)
    return Conceptor(shared @ vectors, 1 / inverses)
