"""DualGPM against its paper's equations, written out slowly."""

import torch
from torch.testing import assert_close

from methods.dual_gpm import Half
from tests.methods.cases import MethodCase, SlowGPM


class SlowDualGPM(SlowGPM):
    def floats(self):
        return sum(M.shape[0] * min(M.shape[1], M.shape[0] - M.shape[1]) for M in self.bases.values())


class TestDualGPM(MethodCase):
    name, slow = "dual_gpm", SlowDualGPM


def test_dual_gpm_keeps_the_smaller_basis():
    M = torch.linalg.qr(torch.randn(7, 5, dtype=torch.float64)).Q
    for k, size, of_complement in ((3, 3, False), (4, 3, True), (5, 2, True), (0, 0, False)):
        half = Half.of(M[:, :k])
        assert (half.columns.shape, half.of_complement) == ((7, size), of_complement)
        assert_close(half.basis() @ half.basis().T, M[:, :k] @ M[:, :k].T)
    assert not Half.of(torch.eye(6)[:, :3]).of_complement, "where both are as small, M needs no work"
