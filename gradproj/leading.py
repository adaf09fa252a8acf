"""The leading eigenvectors of a large matrix, as many as hold a share of its trace, without the others.

A full eigendecomposition costs about 10 d³. Here a block Krylov space (Musco and Musco, NeurIPS 2015, arXiv
1504.05477) grows in float32 until what it holds of the trace suffices; the share is then computed anew for the
directions that are returned, so that single precision costs a few directions more, never the share.
"""

from __future__ import annotations

import torch
from torch import Tensor

OVERSIZE = 1.25  # of the Krylov space, in directions of the smallest that holds enough


def leading_directions(gram: Tensor, basis: Tensor, missing: float) -> Tensor:
    """Directions outside a basis that hold at least `missing` of a matrix's trace, nearly as few as possible.

    Args:
        gram: (d, d) float64, symmetric and positive semidefinite.
        basis: (d, k) float64 orthonormal columns; directions come out orthogonal to them.
        missing: what uᵀ C u, summed over the directions u, must reach; at most tr(C) less what the basis holds.
    Returns:
        (d, r) float64, orthonormal.
    """
    d, room = len(gram), len(gram) - basis.shape[1]
    matrix, held = gram.float(), basis.float()
    width = min(max(32, d // 32), room)
    random = torch.Generator().manual_seed(0)
    block = torch.randn(d, width, generator=random).to(matrix)
    space, images, trace, enough = held, matrix.new_empty(d, 0), 0.0, d
    while space.shape[1] < min(d, enough):
        block = outside(space, block[:, : d - space.shape[1]])
        image = matrix @ block
        space, images = torch.cat([space, block], dim=1), torch.cat([images, image], dim=1)
        trace += (block * image).sum().item()
        if trace >= missing and enough == d:  # some more, so that the leading ones come out well and few suffice
            enough = basis.shape[1] + round(OVERSIZE * images.shape[1])
        block = image
    space = space[:, basis.shape[1] :]
    values, vectors = torch.linalg.eigh(space.T @ images)
    r = int((values.double().flip(0).cumsum(0) < missing).sum()) + 1
    while True:
        directions = refined(basis, (space @ vectors.flip(1)[:, :r]).double())
        found = ((gram @ directions) * directions).sum().item()
        if found >= missing or r >= space.shape[1]:
            return directions
        r = min(space.shape[1], r + max(1, r // 50))


def outside(space: Tensor, block: Tensor) -> Tensor:
    """An orthonormal basis of a block's part outside a space of orthonormal columns; random where nothing is left."""
    for _ in range(2):  # twice: once leaves rounding of the block's size behind
        block = torch.linalg.qr(block - space @ (space.T @ block)).Q
    return block


def refined(basis: Tensor, directions: Tensor) -> Tensor:
    """Directions in float64 that are orthonormal, and orthogonal to a basis, in single precision: to double's rounding.

    Since DᵀD is nearly the identity, D L⁻ᵀ with its Cholesky factor L does, at a third of a QR decomposition's cost.
    """
    for _ in range(2):
        directions = directions - basis @ (basis.T @ directions)
        factor = torch.linalg.cholesky(directions.T @ directions)
        directions = torch.linalg.solve_triangular(factor.T, directions, upper=True, left=False)
    return directions
