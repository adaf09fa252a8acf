"""Which directions a task adds to a basis: against the equations, and by their properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from gradproj.representation import Representation
from gradproj.subspace import count_directions, extend_basis, orthogonal_complement
from tests import reference

THRESHOLDS = [0.3, 0.9, 0.99, 1.0]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=generator(seed))


def orthonormal(d: int, k: int, seed: int = 1) -> Tensor:
    return torch.linalg.qr(normal(d, max(k, 1), seed=seed)).Q[:, :k]


def low_rank(d: int, n: int, rank: int, seed: int = 2) -> Tensor:
    return normal(d, rank, seed=seed) @ normal(rank, n, seed=seed + 1)


def decaying(d: int, n: int, decades: float, seed: int = 3) -> Tensor:
    """Singular values from 1 down to 10^-decades."""
    r = min(d, n)
    values = torch.logspace(0, -decades, r, dtype=torch.float64)
    return orthonormal(d, r, seed) * values @ orthonormal(n, r, seed + 1).T


def from_columns(basis: Tensor, representation: Tensor, threshold: float, rank_rule: str = "paper") -> Tensor:
    return extend_basis(basis, representation, threshold, rank_rule)


def from_gram(basis: Tensor, representation: Tensor, threshold: float, rank_rule: str = "paper") -> Tensor:
    gathered = Representation(len(representation))
    gathered.gram = representation.double() @ representation.double().T  # also where there are few columns
    return extend_basis(basis, gathered, threshold, rank_rule)


ROUTES = [pytest.param(from_columns, id="columns"), pytest.param(from_gram, id="gram")]

# (basis, representation)
CASES = {
    "first task, n < d": (orthonormal(12, 0), normal(12, 5)),
    "first task, n == d": (orthonormal(9, 0), normal(9, 9)),
    "first task, n >> d": (orthonormal(6, 0), normal(6, 400)),
    "first task, rank deficient, n < d": (orthonormal(20, 0), low_rank(20, 10, 4)),
    "first task, rank deficient, n >> d": (orthonormal(8, 0), low_rank(8, 90, 3)),
    "first task, decaying": (orthonormal(16, 0), decaying(16, 40, 3)),
    "later task, n < d": (orthonormal(12, 4), normal(12, 5)),
    "later task, n == d": (orthonormal(9, 3), normal(9, 9)),
    "later task, n >> d": (orthonormal(6, 2), normal(6, 400)),
    "later task, rank deficient, n < d": (orthonormal(20, 7), low_rank(20, 10, 4)),
    "later task, rank deficient, n >> d": (orthonormal(8, 3), low_rank(8, 90, 3)),
    "later task, decaying, n < d": (orthonormal(30, 5), decaying(30, 12, 3)),
    "nearly full": (orthonormal(7, 6), normal(7, 30)),
    "one sample": (orthonormal(5, 1), normal(5, 1)),
    "one input": (orthonormal(1, 0), normal(1, 3)),
}


@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("extend", ROUTES)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_equations(case, extend, threshold):
    basis, representation = CASES[case]
    extended = extend(basis, representation, threshold)
    expected = reference.extend_basis(basis, representation, threshold)
    assert extended.dtype == torch.float64
    assert extended.shape == expected.shape
    assert reference.span_distance(extended, expected) < 1e-9


@pytest.mark.parametrize("extend", ROUTES)
@pytest.mark.parametrize("case", CASES)
def test_one_column_fewer_by_the_released_rule(case, extend):
    basis, representation = CASES[case]
    extended = extend(basis, representation, 0.9, "released")
    expected = reference.extend_basis(basis, representation, 0.9, "released")
    paper = extend(basis, representation, 0.9)
    assert extended.shape[1] == max(paper.shape[1] - 1, basis.shape[1])
    assert reference.span_distance(extended, expected) < 1e-9


@pytest.mark.parametrize("extend", ROUTES)
def test_the_released_rule_keeps_nothing_when_one_direction_is_enough(extend):
    representation = torch.tensor([[10.0], [0.1]]).double() * torch.ones(1, 3)
    assert extend(orthonormal(2, 0), representation, 0.5, "released").shape == (2, 0)


def test_hand_worked_first_task():
    # Energies 16, 9, 4, 1 of 30: cumulative fractions 0.533, 0.833, 0.967, 1.
    representation = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    for threshold, k in [(0.5, 1), (0.54, 2), (0.8, 2), (0.84, 3), (0.96, 3), (0.97, 4), (1.0, 4)]:
        extended = extend_basis(orthonormal(4, 0), representation, threshold)
        assert_close(extended.abs(), torch.eye(4, dtype=torch.float64)[:, :k], msg=f"threshold {threshold}")


def test_hand_worked_later_task():
    # The basis holds 16 of 30; of the rest, 9 makes 25/30 = 0.833, then 4 makes 29/30 = 0.967.
    representation = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    first = torch.eye(4, dtype=torch.float64)[:, :1]
    for threshold, k in [(0.5, 1), (0.54, 2), (0.84, 3), (0.97, 4)]:
        assert extend_basis(first, representation, threshold).shape == (4, k), f"threshold {threshold}"


def test_count_directions_of_an_exact_tie_takes_the_fewest():
    energies = torch.tensor([2.0, 1.0, 1.0])
    assert count_directions(energies, 0.0, 0.5, "paper") == 1  # 2 of 4 is half, and half was asked for
    assert count_directions(energies, 0.0, 0.75, "paper") == 2
    assert count_directions(energies, 4.0, 0.5, "paper") == 0
    assert count_directions(energies, 4.0, 0.75, "paper") == 1
    assert count_directions(energies, 0.0, 0.75, "released") == 1


@pytest.mark.parametrize("extend", ROUTES)
@pytest.mark.parametrize("n", [3, 8, 50], ids="n={}".format)
@pytest.mark.parametrize("k", [0, 3, 8], ids="k={}".format)
def test_zero_representation_adds_nothing(extend, n, k):
    basis = orthonormal(8, k)
    assert torch.equal(extend(basis, torch.zeros(8, n), 1.0), basis)


@pytest.mark.parametrize("extend", ROUTES)
@pytest.mark.parametrize("n", [3, 8, 50], ids="n={}".format)
def test_full_basis_stays(extend, n):
    basis = orthonormal(8, 8)
    assert torch.equal(extend(basis, normal(8, n), 1.0), basis)


@pytest.mark.parametrize("extend", ROUTES)
@pytest.mark.parametrize("n", [3, 8, 50], ids="n={}".format)
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8], ids="scale={:.0e}".format)
def test_what_the_basis_holds_already_adds_nothing(extend, n, scale):
    for seed in range(20):
        basis = orthonormal(12, 5, seed=seed)
        inside = scale * basis @ normal(5, n, seed=seed + 100)
        assert extend(basis, inside, 1.0).shape == (12, 5)


@pytest.mark.parametrize("extend", ROUTES)
@pytest.mark.parametrize("rank", [1, 4, 7], ids="rank={}".format)
@pytest.mark.parametrize("n", [9, 15, 300], ids="n={}".format)
def test_everything_is_the_numerical_rank_and_no_noise(extend, rank, n):
    for seed in range(10):
        representation = low_rank(15, n, rank, seed=seed)
        extended = extend(orthonormal(15, 0), representation, 1.0)
        assert extended.shape == (15, rank)
        held = extended @ (extended.T @ representation)
        assert_close(held, representation, atol=1e-10, rtol=0)
        # Once more, with the same samples: all is held, nothing is left but noise.
        assert extend(extended, representation, 1.0).shape == (15, rank)


@pytest.mark.parametrize("n", [40, 60, 300], ids="n={}".format)
def test_rounding_of_single_precision_is_no_direction(n):
    for seed in range(10):
        representation = low_rank(60, n, 7, seed=seed).float()  # entries rounded to 24 bits
        assert extend_basis(orthonormal(60, 0), representation, 1.0).shape == (60, 7)


@pytest.mark.parametrize(("n", "length"), [(6, 1e-6), (6, 1e-10), (6, 1e-12), (200, 1e-6)])
def test_a_weak_direction_comes_out_orthonormal(n, length):
    # Nearly all of R lies in the basis; what is left is orders of magnitude shorter.
    for seed in range(10):
        basis = orthonormal(40, 10, seed=seed)
        representation = basis @ normal(10, n, seed=seed) + length * low_rank(40, n, 3, seed=seed)
        extended = extend_basis(basis, representation, 1.0)
        assert extended.shape == (40, 13)
        assert_close(extended.T @ extended, torch.eye(13, dtype=torch.float64), atol=1e-13, rtol=0)


def test_many_tasks_keep_the_basis_orthonormal():
    basis = orthonormal(50, 0)
    for task in range(40):
        basis = extend_basis(basis, decaying(50, 20 if task % 2 else 80, 6, seed=task), 0.97)
    assert basis.shape[1] <= 50
    assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("d, k", [(5, 0), (5, 2), (5, 5), (1, 0), (1, 1), (40, 39)])
def test_complement_completes_the_basis(d, k):
    basis = orthonormal(d, k)
    complement = orthogonal_complement(basis)
    assert complement.shape == (d, d - k)
    both = torch.cat([basis, complement], dim=1)
    assert_close(both.T @ both, torch.eye(d, dtype=torch.float64), atol=1e-13, rtol=0)


@pytest.mark.parametrize("extend", ROUTES)
class TestErrors:
    @pytest.mark.parametrize("threshold", [0.0, -0.1, 1.0001, math.nan, math.inf])
    def test_threshold_out_of_range(self, extend, threshold):
        with pytest.raises(ValueError, match=r"threshold is .*; it must be in \(0, 1\]"):
            extend(orthonormal(4, 1), normal(4, 3), threshold)

    def test_rows_disagree(self, extend):
        with pytest.raises(ValueError, match="basis has 5 rows, representation 4; both must be the layer's input size"):
            extend(orthonormal(5, 1), normal(4, 3), 0.9)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    @pytest.mark.parametrize("n", [2, 9], ids="n={}".format)
    def test_not_finite(self, extend, value, n):
        representation = normal(4, n)
        representation[1, 1] = value
        with pytest.raises(ValueError, match="infinite or NaN"):
            extend(orthonormal(4, 1), representation, 0.9)


reproducible = settings(derandomize=True, deadline=None, max_examples=80)


@st.composite
def memories(draw) -> tuple[Tensor, Tensor]:
    """A basis and a representation matrix of any shape, rank and condition."""
    d, n, seed = draw(st.integers(1, 12)), draw(st.integers(1, 30)), draw(st.integers(0, 10**6))
    basis = orthonormal(d, draw(st.integers(0, d)), seed)
    rank = draw(st.integers(0, min(d, n)))
    if rank == 0:
        return basis, torch.zeros(d, n, dtype=torch.float64)
    values = torch.logspace(0, -draw(st.floats(0, 4)), rank, dtype=torch.float64)
    representation = (orthonormal(d, rank, seed + 1) * values) @ orthonormal(n, rank, seed + 2).T
    inside = draw(st.sampled_from([0.0, 1.0, 100.0]))  # how much more of what the basis holds
    return basis, representation + inside * basis @ normal(basis.shape[1], n, seed=seed + 3)


thresholds = st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.9, 0.99, 1.0]))
routes = st.sampled_from([from_columns, from_gram])


@reproducible
@given(memories(), thresholds, routes)
def test_property_orthonormal_extension_of_the_same_basis(memory, threshold, extend):
    basis, representation = memory
    extended = extend(basis, representation, threshold)
    d, k = extended.shape
    assert k <= d
    assert torch.equal(extended[:, : basis.shape[1]], basis)
    assert_close(extended.T @ extended, torch.eye(k, dtype=torch.float64), atol=1e-12, rtol=0)


@reproducible
@given(memories(), thresholds, routes)
def test_property_enough_energy_and_no_column_too_many(memory, threshold, extend):
    basis, representation = memory
    extended = extend(basis, representation, threshold)
    total = reference.energy(representation)

    def missed(columns: Tensor) -> float:
        columns, samples = columns.numpy(), representation.numpy()
        return reference.energy(samples - columns @ (columns.T @ samples))

    allowed = (1 - threshold) * total
    assert missed(extended) <= allowed + 1e-12 * total
    if extended.shape[1] > basis.shape[1]:
        fewer = missed(extended[:, :-1])
        assert fewer > allowed - 1e-12 * total
        assert fewer > 1e-16 * total  # more than rounding: the column was needed


@reproducible
@given(memories(), thresholds, thresholds, routes)
def test_property_a_larger_threshold_holds_all_that_a_smaller_one_does(memory, one, other, extend):
    basis, representation = memory
    low, high = sorted([one, other])
    small, large = extend(basis, representation, low), extend(basis, representation, high)
    assert small.shape[1] <= large.shape[1]
    assert np.linalg.norm(small - large @ (large.T @ small)) < 1e-9


@reproducible
@given(memories(), thresholds, routes, st.floats(-6, 6))
def test_property_scale_does_not_matter(memory, threshold, extend, exponent):
    basis, representation = memory
    scaled = extend(basis, 2.0 ** round(exponent) * representation, threshold)
    assert torch.equal(scaled, extend(basis, representation, threshold))
