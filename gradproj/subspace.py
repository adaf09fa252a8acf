"""Subspaces of a layer's input space: how many directions a task needs, and which (paper Eqs. 5, 8 and 9).

Letters: d size of a layer's input, n samples or patches, k basis columns, R (d, n) representation matrix,
M (d, k) orthonormal basis, N (d, d - k) orthonormal basis of its complement.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gradproj.leading import leading_directions, refined
from gradproj.representation import Representation

RankRule = Literal["paper", "released"]

EPS = torch.finfo(torch.float64).eps
FAST_THRESHOLD = 0.9999  # up to this ε single precision decides ranks as well as double does
# From here on a full decomposition is slow: inputs d where R Rᵀ was gathered, columns n where R itself is.
MANY_INPUTS, MANY_COLUMNS = 2048, 256


def extend_basis(
    basis: Tensor,
    representation: Tensor | Representation,
    threshold: float,
    rank_rule: RankRule = "paper",
    *,
    fast: bool = False,
    max_columns: int | None = None,
) -> Tensor:
    """Append the directions that a task needs to one layer's basis (paper Eqs. 5, 8 and 9).

    With an empty basis this is Eq. 5: the fewest leading left singular vectors of R that hold `threshold` of ‖R‖².
    Otherwise it is Eqs. 8-9: the fewest of R - M Mᵀ R that, with what M holds already, do.

    Args:
        basis: (d, k), orthonormal columns; k may be 0.
        representation: (d, n), one sample or patch a column, any floating dtype; or gathered bit by bit.
        threshold: ε, the fraction of the squared Frobenius norm to hold, in (0, 1].
        rank_rule: "released" appends one direction fewer, as the released code does on the first task.
        fast: decompose large matrices in single precision, as far as ε needs; that holds either way, with perhaps a
            direction more than the fewest.
        max_columns: keep no more directions in all, the leading ones; ε is then perhaps not reached.
    Returns:
        (d, k + r) float64, r >= 0, orthonormal; its first k columns are `basis`.
    Raises:
        ValueError: the row counts disagree, the threshold is out of range, or the representation is not finite.
    """
    if isinstance(representation, Tensor):
        representation = Representation(len(representation)).add(representation)
    d = representation.d
    if basis.shape[0] != d:
        raise ValueError(f"basis has {basis.shape[0]} rows, representation {d}; both must be the layer's input size")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be in (0, 1]")
    if not representation.is_finite:
        raise ValueError("the representation has infinite or NaN values: the network has diverged, or the data are so")
    basis = basis.to(representation.device).double()
    room = d - basis.shape[1] if max_columns is None else max(0, max_columns - basis.shape[1])
    energy = representation.energy
    if room == 0 or energy == 0:
        return basis
    fast = fast and threshold <= FAST_THRESHOLD and rank_rule == "paper"
    if representation.gram is not None:
        if fast and d >= MANY_INPUTS:
            new = _by_large_gram(basis, representation.gram, threshold)
        else:
            new = _by_gram(basis, representation.gram, threshold, rank_rule)
    elif fast and representation.n >= MANY_COLUMNS:
        new = _by_large_columns(basis, representation.held, threshold)
    else:
        new = _by_columns(basis, representation.held, threshold, rank_rule)
    return torch.cat([basis, new[:, :room]], dim=1)


def held_energy(basis: Tensor, representation: Representation) -> float:
    """‖Mᵀ R‖² / ‖R‖², the share of a representation's energy that a basis (d, k) holds; 1 where there is none."""
    if representation.energy == 0:
        return 1.0
    basis = basis.to(representation.device)
    return float(representation.energies(basis).sum() / representation.energy)


def _by_columns(basis: Tensor, representation: Tensor, threshold: float, rank_rule: RankRule) -> Tensor:
    """New directions from R (d, n) with n < d: a thin SVD of the residual within its numerical rank."""
    # Energy below the rounding of the layer's products is noise, not a direction. Columns in half precision are exact
    # in these: what they were rounded from is no business of the layer.
    eps = min(torch.finfo(representation.dtype).eps, torch.finfo(torch.float32).eps)
    noise = len(basis) * eps**2
    columns = representation.double()
    total = columns.square().sum()
    residual = _remove(basis, _remove(basis, columns))  # twice: once leaves rounding of M's size behind
    directions, singular_values, _ = torch.linalg.svd(residual, full_matrices=False)  # (d, n), (n,)
    energies = singular_values.square()
    rank = int((energies > noise * total).sum())
    r = count_directions(energies[:rank], total - energies.sum(), threshold, rank_rule)
    # A weak direction of the residual is orthogonal to M only relative to its length: make it so to rounding.
    return torch.linalg.qr(_remove(basis, directions[:, :r])).Q


def _by_gram(basis: Tensor, gram: Tensor, threshold: float, rank_rule: RankRule) -> Tensor:
    """New directions from C = R Rᵀ (d, d) float64.

    The eigenvectors of Nᵀ C N are the new directions inside the complement of the basis, so N V is orthonormal and
    orthogonal to M by construction, also where R̂ has no energy.
    """
    total = gram.trace()
    # (d, d - k); while M is empty all of R is inside, and three d x d products are spared.
    complement = orthogonal_complement(basis) if basis.shape[1] else None
    inside = gram if complement is None else complement.T @ gram @ complement
    energies, directions = torch.linalg.eigh((inside + inside.T) / 2)
    energies, directions = energies.flip(0).clamp(min=0), directions.flip(1)  # by decreasing energy
    # A Gram matrix squares the condition: below d · eps of the whole there is only rounding, which ε = 1 would keep.
    rank = int((energies > len(gram) * EPS * total).sum())
    r = count_directions(energies[:rank], total - energies.sum(), threshold, rank_rule)
    return directions[:, :r] if complement is None else complement @ directions[:, :r]


def _by_large_gram(basis: Tensor, gram: Tensor, threshold: float) -> Tensor:
    """New directions from C = R Rᵀ, without those that ε does not need."""
    missing = float(threshold * gram.trace() - ((gram @ basis) * basis).sum())
    return leading_directions(gram, basis, missing) if missing > 0 else basis[:, :0]


def _by_large_columns(basis: Tensor, representation: Tensor, threshold: float) -> Tensor:
    """New directions from R (d, n) with n < d, by way of R̂ᵀ R̂ (n, n): R̂ v for each of its leading eigenvectors v."""
    residual = _remove(basis.float(), representation.float())
    total = representation.double().square().sum()
    gram = (residual.T @ residual).double()
    missing = float(gram.trace() - (1 - threshold) * total)
    if missing <= 0:
        return basis[:, :0]
    vectors = leading_directions(gram, gram.new_empty(len(gram), 0), missing)
    directions = (residual @ vectors.float()).double()
    return refined(basis, directions / directions.norm(dim=0))


def count_directions(energies: Tensor, captured: Tensor | float, threshold: float, rank_rule: RankRule) -> int:
    """The fewest leading directions that satisfy Eq. 9 (Eq. 5 where nothing is captured yet).

    Args:
        energies: (m,) squared singular values of the residual, decreasing.
        captured: ‖M Mᵀ R‖², the energy that the basis holds already.
        threshold: ε in (0, 1].
        rank_rule: "released" counts one fewer.
    """
    # Compare what would be missed, not what is held: the last energies vanish in a sum with the first.
    missed = energies.flip(0).cumsum(0).flip(0)  # (m,) energy missed by keeping 0, 1, … m - 1 directions
    total = captured + energies.sum()
    r = int((missed > (1 - threshold) * total).sum())
    return max(r - 1, 0) if rank_rule == "released" else r


def orthogonal_complement(basis: Tensor) -> Tensor:
    """An orthonormal basis N (d, d - k) of the complement of the columns of `basis` (d, k), by Householder QR."""
    d, k = basis.shape
    last = torch.eye(d, dtype=basis.dtype, device=basis.device)[:, k:]
    if k in (0, d):
        return last
    return torch.ormqr(*torch.geqrf(basis), last)  # Q times the last unit vectors, without the rest of Q


def _remove(basis: Tensor, columns: Tensor) -> Tensor:
    """R - M Mᵀ R (paper Eq. 8)."""
    return columns - basis @ (basis.T @ columns)
