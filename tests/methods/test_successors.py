"""GPM and its successors against their papers' equations, written out slowly."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from engine.seeds import generator
from gradproj.errors import InputError
from gradproj.layers import find_layers
from gradproj.representation import Representation
from methods import METHODS
from methods.adam_nscl import used_directions
from methods.dual_gpm import Half
from methods.parts.conceptors import Conceptor, both, conceptor, either
from methods.parts.perturbation import computing_with, of_length
from methods.parts.regions import gradient_rows, layer_gradients, strongest_directions
from methods.parts.replay import Reservoir
from methods.parts.scaled import scaled_parts, scaled_projector
from methods.parts.side_paths import SidePath, side_paths
from report.published import SUCCESSORS
from tests import reference
from tests.methods.cases import KINDS, LR, MethodCase, Slow, SlowGPM, pictures_network, put, rows, train
from tests.tiny_nets import SingleHead, method


class TestNaive(MethodCase):
    name, slow = "naive", Slow


class TestGPM(MethodCase):
    name, slow = "gpm", SlowGPM


def test_steps_that_may_be_taken_otherwise_than_one_operation_at_a_time():
    assert [name for name in SUCCESSORS if METHODS[name].plain_step] == ["dual_gpm", "sgp"]
    assert [name for name in SUCCESSORS if METHODS[name].graph_step] == ["dfgp", "trgp", "code_cl"]
    assert [name for name in SUCCESSORS if METHODS[name].task_identity] == ["trgp", "code_cl", "cuber"]


# DualGPM


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


# SGP


class SlowSGP(SlowGPM):
    """Scaled gradient projection, one direction at a time."""

    def __init__(self, model, options):
        super().__init__(model, options)
        self.importance = {name: torch.zeros(0) for name in self.layers}

    def removed(self, name):
        M = self.bases[name]
        return M @ torch.diag(self.importance[name]).to(M) @ M.T

    def remember(self, t, inputs):
        super().remember(t, inputs)
        alpha = self.options.sgp_alpha
        for name, R in inputs.items():
            M, old = self.bases[name], self.importance[name]
            s = [(R.T @ m).norm() for m in M.T]
            added = [(alpha + 1) * x / (alpha * x + max(s)) for x in s]
            self.importance[name] = torch.stack(
                [min(old[i] + a, torch.ones(())) if i < len(old) else a for i, a in enumerate(added)]
            )

    def floats(self):
        return super().floats() + sum(len(importance) for importance in self.importance.values())


class TestSGP(MethodCase):
    name, slow, changes = "sgp", SlowSGP, {"sgp_alpha": 2.0}


def test_sgp_that_holds_everything_firmly_is_gpm():
    sgp, gpm = method(SingleHead(), "sgp", sgp_alpha=1e12), method(SingleHead(), "gpm")
    for t in range(3):
        for learner in (sgp, gpm):
            train(learner, t, KINDS["one"].task(t))
    assert_close(sgp.model.state_dict(), gpm.model.state_dict())
    assert sgp.memory.columns == gpm.memory.columns


def test_sgp_knows_no_importance_of_a_layer_that_a_task_does_not_use():
    sgp = method(SingleHead(), "sgp")
    train(sgp, 0, KINDS["one"].task(0))
    with torch.no_grad():
        sgp.model.fc1.weight.zero_()  # fc2 sees zeros from now on
    before = sgp.importance["fc2"]
    sgp.after_task(1, KINDS["one"].task(1))
    assert_close(sgp.importance["fc2"], before, atol=0, rtol=0)


# TRGP


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


@pytest.mark.parametrize("k", [0, 20, 70, 150, 200])
def test_projection_by_degrees(k):
    layer = find_layers(nn.Linear(200, 3, bias=False).double())[""]
    M = torch.linalg.qr(torch.randn(200, k).double()).Q
    scale, G = torch.rand(k).double(), torch.randn(3, 200).double()
    projected, _ = scaled_projector(layer, {"": M}, {"": scale})(G)
    assert_close(projected, G - G @ M @ torch.diag(scale) @ M.T)
    assert_close(
        scaled_parts([layer], {layer.module.weight: G}, {"": M}, {"": scale})[layer.module.weight], G - projected
    )


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (5, 4)),
        (nn.Linear(4, 3, bias=False), (2, 5, 4)),
        (nn.Conv2d(2, 3, 3, padding=1), (2, 2, 4, 4)),
        (nn.Conv2d(4, 6, 2, stride=2, groups=2), (2, 4, 4, 4)),
    ],
)
@pytest.mark.parametrize("by_keyword", [False, True])
def test_side_paths_are_dense_weights_whose_gradients_are_projected(module, shape, by_keyword):
    torch.manual_seed(0)
    module = copy.deepcopy(module).double()
    (layer,) = find_layers(nn.Sequential(module)).values()
    parameters = [p for p in layer.parameters if p is not None]
    d, k = layer.input_size, 2
    P = torch.eye(d).double() - 0.3 / d  # any symmetric matrix
    leaves = [part.detach().requires_grad_() for part in layer.rows(*layer.parameters).chunk(layer.groups)]
    paths, shifts, dense, free = {}, [], [], []
    for key, W in zip(layer.keys, leaves, strict=True):
        B, C, F = (torch.linalg.qr(torch.randn(d, k).double()).Q for _ in range(3))
        D, E, H = (nn.Parameter(torch.randn(k, k).double()) for _ in range(3))
        paths[key] = [SidePath(B, D, W.detach() @ B), SidePath(C, E, open=P @ C), SidePath(F, H)]
        V = W.detach().requires_grad_()  # what the third path leaves as it is
        dense.append(W.detach() + W.detach() @ B @ D @ B.T + W @ C @ E @ C.T + V @ F @ H @ F.T)
        shifts += [D, E, H]
        free.append(V)
    x = torch.randn(shape).double().requires_grad_()
    expected = layer.apply(x, *layer.from_rows(torch.cat(dense)))
    loss = lambda output: (output * torch.linspace(-1, 1, output.numel()).view_as(output).double()).sum()  # noqa: E731
    wanted = torch.autograd.grad(loss(expected), [x, *shifts, *leaves, *free])
    plain = torch.autograd.grad(loss(module(x)), parameters)  # what W itself gets, beside what comes through the paths
    with side_paths({"": layer}, paths):
        output = module(input=x) if by_keyword else module(x)
    found = torch.autograd.grad(loss(output), [x, *shifts, *parameters])
    assert_close(output, expected)
    assert_close(found[: -len(parameters)], wanted[: 1 + len(shifts)])
    through = [a - b for a, b in zip(found[-len(parameters) :], plain, strict=True)]
    gradients = zip(wanted[-2 * len(leaves) : -len(leaves)], wanted[-len(leaves) :], strict=True)
    assert_close(layer.rows(*through, *[None] * (module.bias is None)), torch.cat([G @ P + H for G, H in gradients]))
    assert_close(module(x), layer.apply(x, *layer.parameters))


# DFGP


class SlowDFGP(SlowGPM):
    """Two gradients a step, image by image."""

    def gradients(self, t, images, labels):
        options, parameters = self.options, self.trained(t)
        partner = torch.rand(len(labels)).argsort()
        a = torch.full((len(labels),), options.dfgp_beta, dtype=images.dtype)
        mixing = torch.distributions.Beta(a, a).sample().requires_grad_()
        loss = self.loss(t, images, labels, partner, mixing, mixing.detach())
        uphill, *ascent = torch.autograd.grad(loss, [mixing, *parameters])
        mixing = (mixing.detach() + options.dfgp_rho * uphill / uphill.norm()).clip(0, 1)
        length = sum(g.square().sum() for g in ascent).sqrt()
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p, g in zip(parameters, ascent, strict=True):
                p += options.dfgp_rho * g / length
        self.loss(t, images, labels, partner, mixing, mixing).backward()
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)

    def loss(self, t, images, labels, partner, mixing, weights):
        mixed = [(1 - v) * x + v * images[j] for v, x, j in zip(mixing, images, partner, strict=True)]
        log_p = self.model(torch.stack(mixed), t).log_softmax(1)
        terms = [
            -(1 - v) * log_p[i, labels[i]] - v * log_p[i, labels[j]]
            for i, (v, j) in enumerate(zip(weights, partner, strict=True))
        ]
        plain = -self.model(images, t).log_softmax(1)[range(len(labels)), labels].mean()
        return plain + self.options.dfgp_gamma * sum(terms) / len(terms)


class TestDFGP(MethodCase):
    name, slow, changes = "dfgp", SlowDFGP, {"dfgp_gamma": 0.7, "dfgp_rho": 0.3, "dfgp_beta": 0.5}

    def test_without_mixing_and_ascent_is_gpm(self, kind):
        dfgp, gpm = self.make(kind, dfgp_gamma=0.0, dfgp_rho=0.0), method(kind.model(), "gpm")
        for t in range(3):
            for learner in (dfgp, gpm):
                train(learner, t, kind.task(t))
        assert_close(dfgp.model.state_dict(), gpm.model.state_dict())


def test_parameters_come_back_where_they_were():
    model = SingleHead()
    parameters = list(model.parameters())
    model.tied = model.fc2
    with pytest.raises(ValueError, match="stop"), computing_with(model, {parameters[1]: 2 * parameters[1]}):
        assert model.fc1.weight is parameters[0]
        assert_close(model.tied.weight, 2 * parameters[1])
        raise ValueError("stop")
    assert [model.fc1.weight, model.fc2.weight] == parameters
    a, b = of_length([torch.tensor([3.0]), None, torch.tensor([0.0, 4.0])], 0.5)[::2]
    assert (a.item(), *b.tolist()) == pytest.approx((0.3, 0.0, 0.4))
    assert of_length([torch.zeros(2)], 0.5)[0].tolist() == [0.0, 0.0]


# CODE-CL


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
            scaled.append(sum(map(len, learner.directions)))
            assert all(shift.abs().max() > 1e-4 for shifts in learner.shifts for shift in shifts.values())
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
        assert_close(dense(either(a, b)), disjunction(A, B))
        assert_close(dense(both(a, b)), conjunction(A, B), atol=1e-6, rtol=0)
        assert len(both(a, b).values) == max(0, len(a.values) + len(b.values) - 6)
        assert both(a, b).values.diff().le(0).all(), "the first eigenvalues are the largest"
    one = torch.eye(3).double()
    a, b = Conceptor(one[:, :1], torch.tensor([0.9]).double()), Conceptor(one[:, :2], torch.tensor([0.8, 0.7]).double())
    assert (both(a, b).values.sum() / a.values.sum()).item() == pytest.approx(0.82, abs=0.005)
    assert_close(dense(both(a, a)), 0.9 / 1.1 * dense(a) / 0.9)  # 1 / (2 / 0.9 - 1)
    nothing = Conceptor(one[:, :0], torch.zeros(0).double())
    assert both(a, nothing).values.numel() == 0
    assert_close(dense(either(a, nothing)), dense(a))


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


# CUBER


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
    assert cuber.closed("fc1") == [0, 1, 2, 3, 4]
    cuber.helping = {"fc1": [0]}
    assert cuber.closed("fc1") == [2, 3, 4]
    M = cuber.memory.bases["fc1"]
    assert cuber.projector(cuber.memory.layers["fc1"]).is_idle, "its gradients are tested before they are projected"
    cuber.close()
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


# FS-DGPM


class SlowFSDGPM(SlowGPM):
    """The look-ahead written out, gradients by autograd of the whole step."""

    def __init__(self, model, options):
        super().__init__(model, options)
        self.reservoir, self.random = Reservoir(), generator(options.seed, "replay")

    def before(self, t, task):
        self.s = {
            name: torch.ones(M.shape[1], dtype=torch.float64, requires_grad=True) for name, M in self.bases.items()
        }
        self.velocity = {}

    def trained(self, t):
        heads = [p for head in list(getattr(self.model, "heads", []))[:t] for p in head.parameters()]
        return [*super().trained(t), *heads]

    def step(self, t, images, labels):
        trained = {id(p) for p in self.trained(t)}
        names = {name: p for name, p in self.model.named_parameters() if id(p) in trained}
        everything = [(x, y, t) for x, y in zip(images, labels, strict=True)]
        if t:
            everything += zip(*self.reservoir.draw(len(labels), hasattr(self.model, "heads"), self.random), strict=True)
        w, losses = dict(names), []
        for half in (slice(0, len(labels) // 2), slice(len(labels) // 2, None)):
            loss = F.cross_entropy(torch.func.functional_call(self.model, w, (images[half], t)), labels[half])
            found = torch.autograd.grad(
                loss, list(w.values()), create_graph=self.options.fs_order == 2, allow_unused=True
            )
            g = self.soft(t, dict(zip(w, found, strict=True)))
            w = {n: p if g[n] is None else p + self.options.fs_eta1 * g[n].clip(-2, 2) for n, p in w.items()}
            losses.append(self.union_loss(w, everything))
        s = [] if t == 0 else list(self.s.values())
        found = torch.autograd.grad(sum(losses) / 2, [*names.values(), *s], allow_unused=True)
        G = {n: g for n, g in zip(names, found, strict=False) if g is not None}
        G = self.clipped(G)
        held = self.soft(t, G) if t else {}
        layers = {f"{name}.{part}" for name in self.layers for part in ("weight", "bias")}
        S = self.clipped(dict(zip(self.s, found[len(names) :], strict=True))) if t else {}
        with torch.no_grad():
            for n, g in G.items():
                self.move(n, names[n], g - held[n] if t and n in layers else g, LR)
            for n, g in S.items():
                self.move(f"s {n}", self.s[n], g, self.options.fs_eta2)

    def move(self, name, p, g, rate):
        self.velocity[name] = 0.9 * self.velocity.get(name, 0) + g
        p -= rate * self.velocity[name]

    def clipped(self, G):
        norm = sum(g.square().sum() for g in G.values()).sqrt()
        return {n: g * min(1.0, 2 / (norm + 1e-6)) for n, g in G.items()}

    def soft(self, t, g):
        """g V diag(λ) Vᵀ in layers with a basis."""
        result = dict(g)
        for name, layer in self.layers.items() if t else ():
            if g.get(f"{name}.weight") is None:
                continue
            parts = [g[f"{name}.weight"].flatten(1)] + ([] if layer.bias is None else [g[f"{name}.bias"][:, None]])
            V = self.bases[name]
            part = torch.cat(parts, dim=1) @ V @ torch.diag(torch.sigmoid(10 * self.s[name])) @ V.T
            result[f"{name}.weight"] = part[:, : layer.weight[0].numel()].view_as(layer.weight)
            if layer.bias is not None:
                result[f"{name}.bias"] = part[:, -1]
        return result

    def union_loss(self, w, everything):
        many, total, n = hasattr(self.model, "heads"), 0.0, 0
        for j in {int(j) for _, _, j in everything}:
            mine = [(x, y) for x, y, i in everything if int(i) == j]
            if many and len(mine) == 1:  # BatchNorm
                continue
            logits = torch.func.functional_call(self.model, w, (torch.stack([x for x, _ in mine]), j))
            total = total + F.cross_entropy(logits, torch.stack([y for _, y in mine]), reduction="sum")
            n += len(mine)
        return total / n

    def after(self, t, task):
        random = generator(self.options.seed, "reservoir", t)
        self.reservoir = self.reservoir.offer(self.options.memory_images, task.train, t, random)
        random = generator(self.options.seed, "samples", t)
        images = self.reservoir.draw(self.options.n_samples, False, random)[0]
        for name, R in self.inputs(images, t).items():
            self.bases[name] = torch.from_numpy(reference.extend_basis(R[:, :0], R, self.epsilon(t)))

    def floats(self):
        return super().floats() + self.reservoir.images.numel()


class TestFSDGPM(MethodCase):
    name, slow = "fs_dgpm", SlowFSDGPM
    changes = {"momentum": 0.9, "memory_images": 30, "fs_eta1": 0.1, "fs_eta2": 5e4, "threshold": (0.8,)}


class TestFSDGPMFirstOrder(TestFSDGPM):
    changes = TestFSDGPM.changes | {"fs_order": 1}


def test_fs_dgpm_learns_how_firmly_to_hold():
    learner = method(SingleHead(), "fs_dgpm", memory_images=30, fs_eta1=0.5, fs_eta2=5.0)
    train(learner, 0, KINDS["one"].task(0))
    task = KINDS["one"].task(1)
    learner.before_task(1, task)
    with learner.learning(1, task):
        optimizer = learner.optimizer(1, LR)
        for _ in range(20):
            optimizer.zero_grad()
            learner.backward(*task.train, 1)
            optimizer.step()
    firmness = [torch.sigmoid(10 * s) for s in learner.softness.values()]
    start = torch.sigmoid(torch.tensor(10.0)).double()
    assert all((value - start).abs().max() > 1e-6 for value in firmness)
    assert learner.lr == learner.options.lr


def test_fs_dgpm_cuts_gradients_to_a_norm():
    learner = method(pictures_network(), "fs_dgpm", memory_images=30)
    with torch.no_grad():
        for head in learner.model.heads:
            head.weight *= 50
    for t in range(2):
        task = KINDS["many"].task(t)
        learner.before_task(t, task)
        with learner.learning(t, task):
            learner.model.zero_grad()
            learner.backward(*task.train, t)
            found = [p.grad for p in learner.model.parameters() if p.grad is not None]
            norm = sum(g.square().sum() for g in found).sqrt().item()
            assert norm == pytest.approx(2) if t == 0 else 0.1 < norm <= 2  # then most of it is projected away
            assert learner.model.heads[0].weight.grad.norm() < 0.05, "the head of an earlier task is cut with the rest"
        learner.after_task(t, task)


def test_fs_dgpm_looks_less_far_as_the_rate_falls():
    learner = method(SingleHead(), "fs_dgpm", fs_eta1=0.5)
    weights = {p: p for p in learner.model.parameters()}
    task = KINDS["one"].task(0)
    far = learner.uphill(weights, *task.train, 0)
    learner.lr = learner.options.lr / 4
    near = learner.uphill(weights, *task.train, 0)
    for p in weights:
        assert_close(far[p] - p, 4 * (near[p] - p))


# Adam-NSCL


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
