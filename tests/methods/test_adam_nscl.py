"""Adam-NSCL against its paper's equations, written out slowly."""

import torch
from torch.testing import assert_close

from methods.adam_nscl import used_directions
from tests import tiny
from tests.methods.cases import LR, MethodCase, SlowGPM, put, rows
from tests.tiny_nets import SingleHead, method


class SlowAdamNSCL(SlowGPM):
    """Adam by hand, its update projected onto eigenvectors of small eigenvalue."""

    def __init__(self, model, options):
        super().__init__(model, options)
        self.outer = {name: torch.zeros(2 * [M.shape[0]]).double() for name, M in self.bases.items()}
        self.null = {name: torch.eye(M.shape[0]).double() for name, M in self.bases.items()}

    def before(self, t, task):
        self.moments, self.steps = {}, 0

    def step(self, t, images, labels):
        self.model.zero_grad()
        self.gradients(t, images, labels)
        self.steps += 1
        before = {name: rows(layer).clone() for name, layer in self.layers.items()}
        with torch.no_grad():
            for p in self.trained(t):
                m, v = self.moments.get(p, (0.0, 0.0))
                m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
                self.moments[p] = m, v
                p -= LR * (m / (1 - 0.9**self.steps)) / ((v / (1 - 0.999**self.steps)).sqrt() + 1e-8)
            for name, layer in self.layers.items():
                put(layer, before[name] + (rows(layer) - before[name]) @ self.null[name])

    def samples(self, t, task):
        return task.train.images

    def remember(self, t, inputs):
        for name, R in inputs.items():
            self.outer[name] = self.outer[name] + R @ R.T
            values, vectors = torch.linalg.eigh(self.outer[name])
            floor = len(values) * 2.0**-52 * values.sum()
            U = vectors[:, [i for i, v in enumerate(values) if v <= self.options.nscl_ratio * max(values[0], floor)]]
            self.null[name] = U @ U.T

    def floats(self):
        return sum(outer.numel() for outer in self.outer.values())


class TestAdamNSCL(MethodCase):
    name, slow, changes = "adam_nscl", SlowAdamNSCL, {"nscl_ratio": 20.0, "batch_size_test": 50}


def test_the_null_space_of_a_singular_covariance_is_what_no_input_uses():
    random = torch.Generator().manual_seed(0)
    for _ in range(20):
        V = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=random)).Q
        outer = V @ torch.diag(torch.tensor([4.0, 2.0, 1.0, 1e-3, 0.0, 0.0]).double()) @ V.T
        used = used_directions(outer, 10.0)
        assert used.shape == (6, 4)
        assert_close(used @ used.T, V[:, :4] @ V[:, :4].T)
        assert used_directions(outer + torch.eye(6), 2.5).shape == (6, 2)
    assert used_directions(0 * outer, 10.0).shape == (6, 0)


def test_the_covariance_is_of_all_images_however_many_pass_at_once():
    outers = []
    for size in (7, 50):
        learner = method(SingleHead(), "adam_nscl", batch_size_test=size)
        for t in range(2):
            learner.after_task(t, tiny.task(t))
        outers.append(learner.outer["fc1"])
    X = torch.cat([tiny.task(t).train.images for t in range(2)]).T
    for outer in outers:
        assert_close(outer, X @ X.T)
