"""CODE-CL against its paper's equations, written out slowly."""

import pytest
import torch
from torch.testing import assert_close

from engine.seeds import generator
from gradproj.errors import InputError
from methods.parts import conceptors
from methods.parts.conceptors import Conceptor, conceptor
from tests.methods.cases import MethodCase, train
from tests.methods.test_trgp import SlowTRGP
from tests.tiny_nets import SingleHead, method


def dense(c):
    return c.vectors @ torch.diag(c.values) @ c.vectors.T


def aperture(X, alpha, mu):
    """A conceptor by its definition, α by trial."""
    correlation = X @ X.T / X.shape[1]
    while True:
        C = correlation @ torch.linalg.inv(correlation + torch.eye(len(X)) / alpha**2)
        if sum((C @ x).norm() for x in X.T) >= mu * sum(x.norm() for x in X.T):
            return C
        alpha *= 1.1


def cut(C, least):
    values, vectors = torch.linalg.eigh(C)
    return vectors @ torch.diag(values * (values >= least)) @ vectors.T


def disjunction(A, B):
    """De Morgan: ¬(¬A ∧ ¬B), which are invertible."""
    one = torch.eye(len(A)).double()
    return one - torch.linalg.inv(torch.linalg.inv(one - A) + torch.linalg.inv(one - B) - one)


def conjunction(A, B):
    """A ∧ B on what is left alone by the projections onto both ranges."""
    ranges = [torch.linalg.pinv(C, rtol=1e-6) @ C for C in (A, B)]
    values, vectors = torch.linalg.eigh(sum(ranges))
    W = vectors[:, values > 2 - 1e-5]
    inner = torch.linalg.pinv(A, rtol=1e-6) + torch.linalg.pinv(B, rtol=1e-6) - torch.eye(len(A))
    return W @ torch.linalg.inv(W.T @ inner @ W) @ W.T


class SlowCODECL(SlowTRGP):
    """Dense conceptors, by numerical inverses."""

    def __init__(self, model, options):
        super().__init__(model, options)
        self.C = {name: torch.zeros(2 * [basis.shape[0]]).double() for name, basis in self.bases.items()}

    def before(self, t, task):
        options = self.options
        self.Q.append({name: {} for name in self.layers})
        self.regions.append({})
        if not t:
            return
        order = torch.randperm(len(task.train.labels), generator=generator(options.seed, "regions", t))
        for name, X in self.inputs(task.train.images[order[: options.region_images]], t).items():
            both = conjunction(self.C[name], aperture(X, options.code_alpha, options.code_mu))
            if len(X) > options.code_directions and both.trace() > options.code_overlap * self.C[name].trace():
                values, vectors = torch.linalg.eigh(both)
                first = [i for i in reversed(range(len(X))) if values[i] > 1e-9][: options.code_directions]
                self.regions[t][name] = vectors[:, first]
                self.Q[t][name][t] = torch.eye(len(first), dtype=torch.float64, requires_grad=True)

    def removed(self, name):
        return self.C[name]

    def remember(self, t, inputs):
        for name, X in inputs.items():
            C = aperture(X, self.options.code_alpha, self.options.code_mu)
            self.C[name] = cut(disjunction(self.C[name], C) if t else C, 0.2)

    def floats(self):
        memory = sum((len(C) + 1) * int((torch.linalg.eigvalsh(C) > 0.1).sum()) for C in self.C.values())
        scaled = sum(U.numel() for region in self.regions for U in region.values())
        return memory + scaled + sum(Q.numel() for task in self.Q for layer in task.values() for Q in layer.values())


class TestCODECL(MethodCase):
    name, slow = "code_cl", SlowCODECL
    changes = {"code_alpha": 0.3, "code_mu": 0.6, "code_overlap": 0.1, "code_directions": 5, "region_images": 20}

    def test_layers_are_scaled_where_inputs_are_alike(self, kind):
        scaled = []
        for overlap, n in ((0.1, 5), (0.3, 5), (1.1, 5), (0.1, 1000)):
            learner = self.make(kind, code_overlap=overlap, code_directions=n)
            for t in range(3):
                train(learner, t, kind.task(t))
            scaled.append(sum(map(len, learner.shifts)))
            assert all(shift.abs().max() > 1e-4 for shifts in learner.shifts for _, shift in shifts.values())
        assert scaled[0] > scaled[1] > scaled[2] == scaled[3] == 0


def test_code_cl_needs_a_number_of_samples():
    with pytest.raises(InputError, match="^n_samples is all; code_cl holds the inputs .*: give a number$"):
        method(SingleHead(), "code_cl", n_samples="all")


def some_conceptors():
    """Pairs that do not commute, of full and of lower rank."""
    random = torch.Generator().manual_seed(0)
    for ranks in ((6, 6), (4, 5), (3, 3), (2, 3), (6, 1)):
        pair = []
        for rank in ranks:
            V = torch.linalg.qr(torch.randn(6, rank, dtype=torch.float64, generator=random)).Q
            pair.append(Conceptor(V, 0.05 + 0.9 * torch.rand(rank, dtype=torch.float64, generator=random)))
        yield pair


def test_conceptors_or_and_and():
    for a, b in some_conceptors():
        A, B = dense(a), dense(b)
        assert_close(dense(conceptors.disjunction(a, b)), disjunction(A, B))
        assert_close(dense(conceptors.conjunction(a, b)), conjunction(A, B), atol=1e-6, rtol=0)
        assert len(conceptors.conjunction(a, b).values) == max(0, len(a.values) + len(b.values) - 6)
        assert conceptors.conjunction(a, b).values.diff().le(0).all(), "the first eigenvalues are the largest"
    one = torch.eye(3).double()
    a, b = Conceptor(one[:, :1], torch.tensor([0.9]).double()), Conceptor(one[:, :2], torch.tensor([0.8, 0.7]).double())
    assert (conceptors.conjunction(a, b).values.sum() / a.values.sum()).item() == pytest.approx(0.82, abs=0.005)
    assert_close(dense(conceptors.conjunction(a, a)), 0.9 / 1.1 * dense(a) / 0.9)  # 1 / (2 / 0.9 - 1)
    nothing = Conceptor(one[:, :0], torch.zeros(0).double())
    assert conceptors.conjunction(a, nothing).values.numel() == 0
    assert_close(dense(conceptors.disjunction(a, nothing)), dense(a))


def test_conceptors_of_inputs():
    random = torch.Generator().manual_seed(0)
    for n in (3, 20):
        X = (
            torch.randn(6, n, dtype=torch.float64, generator=random)
            * torch.tensor([3.0, 2, 1, 0.5, 0.1, 0.01])[:, None]
        )
        for mu in (0.0, 0.5, 0.95):
            assert_close(dense(conceptor(X, 0.7, mu)), aperture(X, 0.7, mu))
    assert conceptor(X, 1e9, 0.5).values.max() < 1
    assert conceptor(0 * X, 1.0, 0.9).values.tolist() == [0.0] * 6
    assert conceptor(X, 1.0, 0.0).above(0.2).values.min() >= 0.2
