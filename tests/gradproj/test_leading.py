"""The leading part of a large matrix's eigenvectors against all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gradproj import subspace
from gradproj.leading import leading_directions
from gradproj.representation import Representation
from gradproj.subspace import extend_basis, held_energy

DOUBLE = torch.float64


def matrix(d: int, n: int, decay: float, seed: int = 0) -> Tensor:
    """R (d, n) whose singular values fall by a power."""
    random = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(d, d, generator=random, dtype=DOUBLE)).Q
    right = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=DOUBLE)).Q
    size = min(d, n)
    return left[:, :size] * torch.arange(1, size + 1, dtype=DOUBLE) ** -decay @ right[:size]


def fewest(gram: Tensor, basis: Tensor, missing: float) -> int:
    """How many directions a full decomposition needs."""
    outside = torch.eye(len(gram), dtype=DOUBLE) - basis @ basis.T
    values = torch.linalg.eigvalsh(outside @ gram @ outside).flip(0)
    return int((values.cumsum(0) < missing).sum()) + 1


@pytest.mark.parametrize("k", [0, 25])
@pytest.mark.parametrize("decay", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", [0.5, 0.9, 0.99, 0.999])
def test_enough_and_nearly_the_fewest(decay, epsilon, k):
    R = matrix(200, 400, decay)
    gram = R @ R.T
    basis = torch.linalg.qr(R[:, :k]).Q
    missing = float(epsilon * gram.trace() - ((gram @ basis) * basis).sum())
    if missing <= 0:
        pytest.skip("the basis holds enough")
    directions = leading_directions(gram, basis, missing)
    both = torch.cat([basis, directions], dim=1)
    assert (both.T @ both - torch.eye(both.shape[1], dtype=DOUBLE)).abs().max() < 1e-12
    assert ((gram @ directions) * directions).sum() >= missing
    assert directions.shape[1] <= 1.06 * fewest(gram, basis, missing) + 2


def test_the_share_is_held_exactly_where_single_precision_says_almost():
    R = matrix(120, 200, 1.0)
    gram = R @ R.T
    values = torch.linalg.eigvalsh(gram).flip(0)
    for r in range(1, 60, 3):
        missing = float(values[:r].sum() * (1 - 1e-10))
        directions = leading_directions(gram, gram[:, :0], missing)
        assert ((gram @ directions) * directions).sum() >= missing


def test_a_matrix_of_low_rank_is_spanned():
    R = matrix(150, 6, 0.5)
    gram = R @ R.T
    directions = leading_directions(gram, gram[:, :0], float(0.999999 * gram.trace()))
    assert directions.shape[1] <= 7
    assert (R - directions @ (directions.T @ R)).norm() < 2e-3 * R.norm()


def test_all_that_is_left_where_nothing_less_suffices():
    gram = torch.eye(40, dtype=DOUBLE)
    basis = torch.eye(40, dtype=DOUBLE)[:, :10]
    assert leading_directions(gram, basis, 29.9).shape[1] == 30


@pytest.mark.parametrize("n", [30, 90])
@pytest.mark.parametrize("tasks", [1, 3])
def test_extending_fast_holds_the_threshold(monkeypatch, n, tasks):
    """Fewer samples than inputs, and more; a task after others."""
    monkeypatch.setattr(subspace, "MANY_INPUTS", 40)
    monkeypatch.setattr(subspace, "MANY_COLUMNS", 5)
    exact = fast = torch.zeros(60, 0, dtype=DOUBLE)
    for t in range(tasks):
        R = matrix(60, n, 1.2, seed=t).float()
        seen = Representation(60).add(R)
        exact, fast = extend_basis(exact, seen, 0.97), extend_basis(fast, seen, 0.97, fast=True)
        assert held_energy(fast, seen) >= 0.97 - 1e-12
        assert (fast.T @ fast - torch.eye(fast.shape[1], dtype=DOUBLE)).abs().max() < 1e-12
    assert exact.shape[1] <= fast.shape[1] <= 1.1 * exact.shape[1] + 2


def test_a_high_threshold_is_decided_exactly(monkeypatch):
    monkeypatch.setattr(subspace, "MANY_INPUTS", 10)
    seen = Representation(60).add(matrix(60, 90, 1.2))
    empty = torch.zeros(60, 0, dtype=DOUBLE)
    assert torch.equal(extend_basis(empty, seen, 0.99995, fast=True), extend_basis(empty, seen, 0.99995))
