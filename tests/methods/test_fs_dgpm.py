"""FS-DGPM against its paper's equations, written out slowly."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from engine.seeds import generator
from methods.parts.replay import Reservoir
from tests import reference, tiny
from tests.methods.cases import KINDS, LR, Kind, MethodCase, SlowGPM, pictures_network, train
from tests.tiny_nets import SingleHead, method


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
        there = {n: g for n, g in G.items() if g is not None}
        norm = sum(g.square().sum() for g in there.values()).sqrt()
        return {n: g * min(1.0, 2 / (norm + 1e-6)) for n, g in there.items()}

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
        images, _, tasks = self.reservoir.draw(self.options.n_samples, False, random)
        parts = [images]
        if hasattr(self.model, "heads"):  # BatchNorm: a batch is of one task
            parts = [part for j in range(t + 1) if len(part := images[tasks == j]) > 1]
        seen = [self.inputs(part, t) for part in parts]
        for name in seen[0]:
            R = np.concatenate([inputs[name] for inputs in seen], axis=1)
            self.bases[name] = torch.from_numpy(reference.extend_basis(R[:, :0], R, self.epsilon(t)))

    def floats(self):
        return super().floats() + self.reservoir.images.numel()


class TestFSDGPM(MethodCase):
    name, slow = "fs_dgpm", SlowFSDGPM
    changes = {"momentum": 0.9, "memory_images": 30, "fs_eta1": 0.1, "fs_eta2": 5e4, "threshold": (0.8,)}


class TestFSDGPMFirstOrder(TestFSDGPM):
    changes = TestFSDGPM.changes | {"fs_order": 1}


class Wide(nn.Module):
    """More units than a batch has images, whose rows gradients are made of then; one layer's output is unused."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(tiny.N_INPUTS, 20, bias=False), nn.Linear(20, 25)
        self.fc3, self.idle = nn.Linear(25, tiny.N_CLASSES, bias=False), nn.Linear(25, 20)
        self.double()

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        h = F.relu(self.fc2(F.relu(self.fc1(images))))
        self.idle(h)
        return self.fc3(h)


class TestFSDGPMOfFewRows(TestFSDGPM):
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "kind" in metafunc.fixturenames:
            metafunc.parametrize("kind", [Kind(Wide, tiny.task)])


class TestFSDGPMOfFewRowsFirstOrder(TestFSDGPMOfFewRows):
    changes = TestFSDGPM.changes | {"fs_order": 1}


def test_a_layer_that_is_frozen_later_stays():
    learner = method(Wide(), "fs_dgpm", memory_images=30)
    train(learner, 0, tiny.task(0))
    learner.model.fc2.requires_grad_(False)
    before = learner.model.fc2.weight.clone()
    train(learner, 1, tiny.task(1))
    assert_close(learner.model.fc2.weight, before, atol=0, rtol=0)


def test_attention_can_be_differentiated_twice():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(3, 3) for _ in range(3))

        def forward(self, images: Tensor, task: int = 0) -> Tensor:
            tokens = images.unflatten(1, (1, 4, 3))
            return F.scaled_dot_product_attention(self.q(tokens), self.k(tokens), self.v(tokens)).mean((1, 2))

    train(method(Attention(), "fs_dgpm"), 0, tiny.task(0, dtype=torch.float32))


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
