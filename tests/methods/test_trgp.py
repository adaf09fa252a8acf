"""TRGP against its paper's equations, written out slowly."""

import torch
from torch.nn import functional as F
from torch.testing import assert_close

from engine.seeds import generator
from gradproj.representation import Representation
from methods.parts.regions import gradient_rows, layer_gradients, strongest_directions
from tests.methods.cases import KINDS, LR, MethodCase, SlowGPM, rows, train
from tests.tiny_nets import SingleHead, method


class SlowTRGP(SlowGPM):
    """Trust regions with dense scaled weights."""

    def __init__(self, model, options):
        super().__init__(model, options)
        self.regions, self.Q = [], []  # by task: B of each layer; Q of each layer and region

    def before(self, t, task):
        self.Q.append({name: {} for name in self.layers})
        if t:
            for name, G in self.gradient_before(t, task).items():
                near = {j: (G @ B[name] @ B[name].T).norm() for j, B in enumerate(self.regions)}
                near = {j: p for j, p in near.items() if p > self.options.region_threshold * G.norm()}
                for j in sorted(near, key=near.get)[-2:]:
                    k = self.regions[j][name].shape[1]
                    self.Q[t][name][j] = torch.eye(k, dtype=torch.float64, requires_grad=True)

    def gradient_before(self, t, task):
        order = torch.randperm(len(task.train.labels), generator=generator(self.options.seed, "regions", t))
        images, labels = (part[order[: self.options.region_images]] for part in task.train)
        self.model.zero_grad()
        self.gradients(t, images, labels)
        return {name: rows(layer, "grad").clone() for name, layer in self.layers.items()}

    def scaled(self, name, t):
        """W̃ (o, d)."""
        W = torch.cat([p.flatten(1) if p.ndim > 1 else p[:, None] for p in self.layers[name].parameters()], dim=1)
        regions = [(self.regions[j][name], Q) for j, Q in self.Q[t][name].items()]
        return W + sum(W @ B @ (Q - torch.eye(len(Q)).to(Q)) @ B.T for B, Q in regions)

    def output(self, images, t):
        weights = {}
        for name, layer in self.layers.items():
            W = self.scaled(name, t)
            weights[f"{name}.weight"] = W[:, : layer.weight[0].numel()].view_as(layer.weight)
            if layer.bias is not None:
                weights[f"{name}.bias"] = W[:, -1]
        return torch.func.functional_call(self.model, weights, (images, t))

    def step(self, t, images, labels):
        shifts = [Q for parts in self.Q[t].values() for Q in parts.values()]
        for Q in shifts:
            Q.grad = None
        super().step(t, images, labels)
        with torch.no_grad():
            for Q in shifts:
                Q -= LR * Q.grad

    def remember(self, t, inputs):
        self.regions.append({})
        for name, R in inputs.items():
            M = self.bases[name]
            U, S, _ = torch.linalg.svd(R - M @ M.T @ R, full_matrices=False)
            new = U[:, S > 1e-9 * R.norm()]
            held, taken = 0.0, []
            everything = torch.cat([M, new], dim=1)
            for energy, i in sorted(((R.T @ m).square().sum().item(), i) for i, m in enumerate(everything.T))[::-1]:
                if held >= self.epsilon(t) * R.square().sum():
                    break
                held += energy
                taken.append(i)
            self.regions[t][name] = everything[:, sorted(taken)]
            self.bases[name] = everything[:, : max(M.shape[1], max(taken) + 1)]

    def floats(self):
        return super().floats() + sum(Q.numel() for task in self.Q for layer in task.values() for Q in layer.values())


class TestTRGP(MethodCase):
    name, slow, changes = "trgp", SlowTRGP, {"region_threshold": 0.3, "region_images": 20, "threshold": (0.8,)}

    def test_regions_are_chosen_and_their_weights_move(self, kind):
        trgp = self.make(kind)
        for t in range(3):
            train(trgp, t, kind.task(t))
        shifts = [shift for task in trgp.shifts for layer in task.values() for shift in layer.values()]
        assert len(shifts) > 2
        assert all(shift.abs().max() > 1e-4 for shift in shifts)

    def test_weights_that_stay_as_they_are_are_gpms(self, kind, monkeypatch):
        trgp, gpm = self.make(kind), method(kind.model(), "gpm", threshold=(0.8,))
        monkeypatch.setattr(type(trgp), "parameters", type(gpm).parameters)  # Q stays I
        for learner in (trgp, gpm):
            train(learner, 0, kind.task(0))
            train(learner, 1, kind.task(1))
        assert any(trgp.shifts[1].values())
        assert_close(trgp.model.state_dict(), gpm.model.state_dict())

    def test_old_outputs_stay(self):
        trgp = method(SingleHead(), "trgp", region_threshold=0.1, threshold=(1.0,), threshold_step=0.0, n_samples=4)
        outputs = []
        for t in range(3):
            task = KINDS["one"].task(t)
            train(trgp, t, task)
            images = next(iter(trgp.representative(t, task.train)[0]))
            outputs.append((images, outputs_of(trgp, images, t)))
        assert any(trgp.shifts[2].values())
        for t, (images, before) in enumerate(outputs):
            assert_close(outputs_of(trgp, images, t), before)
        images, before = outputs[0]
        assert (trgp.model(images, 0) - before).abs().max() < 1e-9  # the first task has no weights of its own
        assert (trgp.model(outputs[2][0], 2) - outputs[2][1]).abs().max() > 1e-3  # the last one has


def outputs_of(learner, images, t):
    """The outputs on images of task t, as it is tested."""
    with learner.testing(t), torch.no_grad():
        return learner.model.eval()(images, t)


def test_trgp_by_the_released_rule_takes_one_direction_fewer_on_the_first_task_alone():
    sizes, held = {}, []
    for protocol in ("paper", "released"):
        learner = method(SingleHead(), "trgp", protocol=protocol, threshold=(0.9,), threshold_step=0.0)
        for t in range(2):
            task = KINDS["one"].task(t)
            learner.before_task(t, task)
            learner.after_task(t, task)
            inputs = learner.memory.gather(learner.model, learner.representative(t, task.train)[0])["fc1"]
            held.append(inputs.energies(learner.span("fc1", t)).sum() / inputs.outer.trace())
        sizes[protocol] = len(learner.regions[0]["fc1"])
    assert sizes["released"] == sizes["paper"] - 1
    assert [share >= 0.9 for share in held] == [True, True, False, True]


def test_trust_regions_are_the_nearest_two():
    trgp = method(SingleHead(), "trgp", region_threshold=0.4)
    trgp.memory.bases["fc1"] = torch.eye(12).double()[:, :8]
    trgp.regions = [{"fc1": torch.tensor(columns).long()} for columns in ([0, 1], [1, 2], [0, 1, 3], [4], [])]
    squares = torch.tensor(
        [3.0, 1.0, 6.0, 0.5, 1.7, 0, 0, 0, 1, 1, 1, 1]
    ).double()  # of the gradient's columns; sum 16.2
    G = torch.diag(squares.sqrt())
    # ‖G B‖ / ‖G‖: √(4, 7, 4.5, 1.7, 0) / √16.2 = 0.497, 0.657, 0.527, 0.324, 0
    assert [trgp.nearest(t, "fc1", G) for t in range(1, 6)] == [[0], [1, 0], [1, 2], [1, 2], [1, 2]]
    trgp.regions = trgp.regions[3:]
    assert trgp.nearest(2, "fc1", G) == []
    assert trgp.nearest(2, "fc1", 0 * G) == []


def test_trust_regions_have_no_directions_of_rounding():
    M = torch.linalg.qr(torch.randn(9, 6, generator=torch.Generator().manual_seed(0)).double()).Q
    R = M[:, 1:3] @ torch.randn(2, 5, generator=torch.Generator().manual_seed(1)).double()
    assert strongest_directions(M, Representation(9).add(R), 1.0, "paper")[1].tolist() == [1, 2]


def test_trust_regions_are_columns_of_the_memory():
    generator = torch.Generator().manual_seed(0)
    M = torch.linalg.qr(torch.randn(6, 2, dtype=torch.float64, generator=generator)).Q
    R = M @ torch.tensor([[1.0], [2.0]]).double()  # the second is the stronger
    assert strongest_directions(M, Representation(6).add(R), 1.0, "paper")[1].tolist() == [0, 1]
    R = 3 * torch.outer(M[:, 1], torch.randn(9, generator=generator).double())  # the second old direction is strong
    R = R + 0.3 * torch.randn(6, 9, dtype=torch.float64, generator=generator)
    basis, taken = strongest_directions(M, Representation(6).add(R), 0.9, "paper")
    assert_close(basis[:, :2], M)
    assert taken.tolist() == [1, *range(2, basis.shape[1])]
    assert (R.T @ basis[:, taken]).square().sum() >= 0.9 * R.square().sum()
    weakest = (R.T @ basis[:, taken]).square().sum(0).min()
    assert (R.T @ basis[:, taken]).square().sum() - weakest < 0.9 * R.square().sum()
    assert len(strongest_directions(M, Representation(6).add(R), 0.9, "released")[1]) == len(taken) - 1
    assert strongest_directions(M, Representation(6).add(0 * R), 0.9, "paper")[1].tolist() == []


def test_regions_are_chosen_by_the_gradient_of_some_images():
    learner, task = method(SingleHead(), "trgp"), KINDS["one"].task(0)
    learner.model.fc1.weight.grad = torch.ones_like(learner.model.fc1.weight)  # left over from before
    found = layer_gradients(learner, 2, task.train, 5)
    assert learner.model.fc1.weight.grad is None
    order = torch.randperm(len(task.train.labels), generator=generator(learner.options.seed, "regions", 2))[:5]
    F.cross_entropy(learner.model(task.train.images[order], 2), task.train.labels[order]).backward()
    assert_close(found, {name: rows(getattr(learner.model, name), "grad") for name in ("fc1", "fc2")})
    learner.model.fc2.weight.grad = None
    found = gradient_rows(learner.memory.layers)
    assert_close(found["fc1"], rows(learner.model.fc1, "grad"))
    assert_close(found["fc2"], torch.zeros(3, 7).double())
