"""CUBER against its paper's equations, written out slowly."""

import torch
from torch.testing import assert_close

from engine.seeds import generator
from tests.methods.cases import KINDS, LR, MethodCase, put, rows, train
from tests.methods.test_trgp import SlowTRGP
from tests.tiny_nets import SingleHead, method


class SlowCUBER(SlowTRGP):
    """Three regimes, with dense weights and the orthonormalised sum of what may not be moved in."""

    def __init__(self, model, options):
        super().__init__(model, options)
        self.learned, self.helping, self.start = [], {}, {}

    def before(self, t, task):
        self.helping = {}
        super().before(t, task)
        self.start = {name: rows(layer).clone() for name, layer in self.layers.items()}
        if t:
            for name, G in self.gradient_before(t, task).items():
                self.helping[name] = [j for j in self.Q[t][name] if self.agrees(name, j, G)]

    def agrees(self, name, j, G):
        a, b = self.learned[j][name].flatten(), G.flatten()
        return a.norm() > 0 and b.norm() > 0 and a @ b >= self.options.cuber_agreement * a.norm() * b.norm()

    def removed(self, name):
        spans = [B[name] for j, B in enumerate(self.regions) if j not in self.helping.get(name, [])]
        if not spans:
            return torch.zeros(2 * [self.bases[name].shape[0]]).double()
        U, S, _ = torch.linalg.svd(torch.cat(spans, dim=1), full_matrices=False)
        return U[:, S > 1e-6] @ U[:, S > 1e-6].T

    def gradients(self, t, images, labels):
        super().gradients(t, images, labels)
        for name, layer in self.layers.items():
            G = rows(layer, "grad")
            tasks = [j for j in self.helping.get(name, []) if self.agrees(name, j, G)]
            self.helping[name] = tasks
            for j in tasks:
                moved = (rows(layer) - self.start[name]) @ self.regions[j][name] @ self.regions[j][name].T
                if moved.norm() > 1e-12:
                    G = G + self.options.cuber_lambda * moved / moved.norm()
            with torch.no_grad():
                put(layer, G, "grad")

    def after(self, t, task):
        super().after(t, task)
        self.helping = {}
        order = torch.randperm(len(task.train.labels), generator=generator(self.options.seed, "regions", t))
        self.model.zero_grad()
        self.gradients(t, *(part[order[: self.options.n_samples]] for part in task.train))
        self.learned.append({name: rows(layer, "grad").clone() for name, layer in self.layers.items()})

    def floats(self):
        return super().floats() + sum(G.numel() for task in self.learned for G in task.values())


class TestCUBER(MethodCase):
    name, slow = "cuber", SlowCUBER
    changes = {"region_threshold": 0.2, "region_images": 20, "threshold": (0.8,), "cuber_lambda": 0.3}

    def make(self, kind, **changes):
        """With an agreement that some old tasks keep to and others cease to."""
        return super().make(kind, **{"cuber_agreement": 0.26 if kind is KINDS["one"] else 0.06} | changes)

    def test_old_tasks_are_helped_until_gradients_disagree(self, kind):
        cuber = self.make(kind, cuber_agreement=0.25 if kind is KINDS["one"] else 0.0)
        train(cuber, 0, kind.task(0))
        chosen, dropped = [], []
        for t in (1, 2):
            cuber.before_task(t, kind.task(t))
            before = {key: list(tasks) for key, tasks in cuber.helping.items()}
            with cuber.learning(t, kind.task(t)):
                optimizer = cuber.optimizer(t, LR)
                for _ in range(20):
                    optimizer.zero_grad()
                    cuber.backward(*kind.task(t).train, t)
                    optimizer.step()
            chosen += [j for key in before for j in before[key]]
            dropped += [j for key in before for j in before[key] if j not in cuber.helping[key]]
            cuber.after_task(t, kind.task(t))
        assert len(chosen) > len(dropped) > 0

    def test_gradients_are_those_at_the_weights_that_a_task_is_tested_with(self, kind):
        cuber = self.make(kind)
        slow = SlowCUBER(kind.model(), cuber.options)
        for t in range(2):
            train(cuber, t, kind.task(t))
            slow.learn(t, kind.task(t))
            assert_close(cuber.gradients[t], slow.learned[t])

    def test_that_helps_nobody_is_trgp(self, kind):
        changes = {name: value for name, value in self.changes.items() if name != "cuber_lambda"}
        cuber, trgp = self.make(kind, cuber_agreement=1.1), method(kind.model(), "trgp", **changes)
        for t in range(3):
            for learner in (cuber, trgp):
                train(learner, t, kind.task(t))
        assert_close(cuber.weights(), trgp.weights())


def test_cuber_moves_in_what_helps_and_nobody_else_uses():
    cuber = method(SingleHead(), "cuber")
    cuber.memory.bases["fc1"] = torch.linalg.qr(torch.randn(12, 5).double()).Q
    cuber.regions = [{"fc1": torch.tensor([0, 1, 2])}, {"fc1": torch.tensor([2, 3, 4])}]
    assert cuber.protected_columns("fc1") == [0, 1, 2, 3, 4]
    cuber.helping = {"fc1": [0]}
    assert cuber.protected_columns("fc1") == [2, 3, 4]
    M = cuber.memory.bases["fc1"]
    assert cuber.projector(cuber.memory.layers["fc1"]).is_idle, "its gradients are tested before they are projected"
    cuber.make_projectors()
    (project,) = cuber.late_projectors["fc1"].groups
    assert_close(project(M.T), M.T * torch.tensor([1.0, 1, 0, 0, 0]).double()[:, None])


def test_gradients_that_agree():
    cuber = method(SingleHead(), "cuber", cuber_agreement=0.5)
    G = torch.eye(2).double()
    cuber.gradients = [{"fc1": part} for part in (2 * G, -G, 0 * G, G + torch.tensor([[0.0, 3.0], [0, 0]]), G.flip(0))]
    assert cuber.agreeing("fc1", G, [0, 1, 2, 3, 4]) == [0]  # 3 has a cosine of 2 / √22 = 0.43, 4 of 0
    assert cuber.agreeing("fc1", 0 * G, [0]) == []
    cuber.options.cuber_agreement = 0.0
    assert cuber.agreeing("fc1", G, [0, 1, 2, 3, 4]) == [0, 3, 4]
    assert cuber.agreeing("fc1", G, [3]) == [3]


def test_cuber_goes_back_to_whom_it_helped():
    cuber = method(SingleHead(), "cuber", region_threshold=0.0, cuber_agreement=-1.0)
    train(cuber, 0, KINDS["one"].task(0))
    task = KINDS["one"].task(1)
    cuber.before_task(1, task)
    with cuber.learning(1, task):
        saved, helped = cuber.state_dict(), list(cuber.helping_spans)
        cuber.helping = {key: [] for key in cuber.helping}
        cuber.make_projectors()
        cuber.load_state_dict(saved)
        assert list(cuber.helping_spans) == helped != []


def test_a_layer_that_gets_no_gradient_helps_nobody():
    class Skipping(SingleHead):
        def forward(self, images, task=0):
            return super().forward(images, task) if task == 0 else self.fc2(images[:, :7])

    cuber = method(Skipping(), "cuber", region_threshold=0.0, cuber_agreement=-1.0, n_samples=5)
    train(cuber, 0, KINDS["one"].task(0))
    task = KINDS["one"].task(1)
    cuber.shifts, cuber.helping = [*cuber.shifts, {"fc1": {}}], {"fc1": [0]}
    cuber.before = {"fc1": {0: cuber.model.fc1.weight.detach() @ cuber.span("fc1", 0)}}
    before = cuber.model.fc1.weight.clone()
    with cuber.learning(1, task):
        cuber.backward(*task.train, 1)
    assert cuber.helping == {"fc1": []}
    assert cuber.model.fc1.weight.grad is None
    assert_close(cuber.model.fc1.weight, before)
