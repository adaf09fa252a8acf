"""HAT against its paper's equations, and what its gates protect."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from gradproj.errors import InputError
from methods.hat import HAT
from models import AlexNet, LeNet, ResNet18
from tests import tiny
from tests.tiny_nets import Residual, gradients, method, picture_task

SOURCES = {"stem": [], "conv1": ["stem"], "fc": ["conv1", "stem"]}


def ready(model, t=0, **changes) -> HAT:
    """A HAT that has begun task t."""
    hat = method(model, "hat", **changes)
    with hat.learning(t, picture_task(t)):
        return hat


def train(hat, t, n_steps):
    task = picture_task(t)
    with hat.learning(t, task):
        optimizer = torch.optim.SGD(hat.parameters(t), lr=0.5)
        for step in range(n_steps):
            hat.model.train()
            part = slice(8 * (step % 3), 8 * (step % 3) + 8)  # three batches an epoch
            optimizer.zero_grad()
            hat.backward(task.train.images[part], task.train.labels[part], t)
            optimizer.step()
            hat.after_step(t)


def test_units_of_a_residual_network():
    hat = ready(Residual())
    assert hat.sources == SOURCES
    assert hat.norms == {"stem": "bn_stem", "conv1": "bn1"}


class Again(Residual):
    """A layer that runs twice, once on another's units and once on its own, and one that reads the images too."""

    def __init__(self) -> None:
        super().__init__()
        self.skip = nn.Conv2d(4, 4, 1, bias=False).double()
        self.bn_stem = self.bn1 = nn.Identity()

    def forward(self, images, task):
        images = images.mul_(1)  # in place, as a normalisation at the beginning of a network may
        x = self.conv1(self.conv1(self.stem(images)))
        x = self.skip(x + images.repeat(1, 2, 1, 1))
        return self.heads[task](self.fc(nn.functional.max_pool2d(x, 2).flatten(1)))


def test_units_of_layers_that_run_twice_or_read_the_images_beside_other_layers():
    assert ready(Again()).sources == {"stem": [], "conv1": ["conv1", "stem"], "skip": [], "fc": ["skip"]}


def test_units_of_the_paper_networks():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for model, n_norms in ((AlexNet([3, 3]), 5), (LeNet([3, 3]), 0), (ResNet18([3, 3], width=2), 20)):
        hat = method(model, "hat")
        task = picture_task(0)
        with hat.learning(0, type(task)("", 3, task.train._replace(images=images), task.valid, task.test)):
            assert len(hat.norms) == n_norms
        if isinstance(model, ResNet18):
            assert hat.sources["layer1.0.conv1"] == ["conv1"]
            assert hat.sources["layer1.0.conv2"] == ["layer1.0.conv1"]
            assert hat.sources["layer1.1.conv1"] == ["conv1", "layer1.0.conv2"]
            assert hat.sources["layer2.0.shortcut.0"] == ["conv1", "layer1.0.conv2", "layer1.1.conv2"]
            assert hat.sources["layer2.1.conv1"] == ["layer2.0.conv2", "layer2.0.shortcut.0"]
            assert hat.norms["layer2.0.shortcut.0"] == "layer2.0.shortcut.1"
        else:
            names = list(hat.layers)
            assert [hat.sources[name] for name in names] == [[]] + [[name] for name in names[:-1]]


def test_gates_multiply_units():
    model = Residual()
    hat = ready(model)
    hat.slope = 0.3  # of the last training step: it plays no part at test
    e = {name: p.detach()[1] for name, p in hat.embeddings.items()}
    images = picture_task(1).train.images
    a = {name: torch.sigmoid(400 * value) for name, value in e.items()}
    model.eval()
    plain = Residual().eval()
    x = F.relu(a["stem"].view(1, -1, 1, 1) * plain.bn_stem(plain.stem(images)))
    x = F.relu(x + a["conv1"].view(1, -1, 1, 1) * plain.bn1(plain.conv1(x)))
    x = F.relu(a["fc"] * plain.fc(F.max_pool2d(x, 2).flatten(1)))
    assert_close(model(images, 1), plain.heads[1](x))
    assert_close(model(images, task=1), plain.heads[1](x))


def test_slope_rises_within_each_epoch():
    hat = ready(Residual(), hat_smax=50.0)
    images, labels = picture_task(0).train
    slopes = []
    for _ in range(7):  # three batches an epoch
        hat.loss(images[:8], labels[:8], 0).backward()
        hat.after_step(0)
        slopes.append(hat.slope)
    expected = [1 / 50 + (50 - 1 / 50) * (b - 1) / (3 - 1) for b in (1, 2, 3, 1, 2, 3, 1)]
    assert slopes == pytest.approx(expected)


def test_loss_charges_for_units_that_are_not_in_use_yet():
    model = Residual()
    hat = ready(model, hat_sparsity=0.6)
    random = torch.Generator().manual_seed(0)
    hat.past = {name: torch.rand(p.shape, generator=random, dtype=p.dtype) for name, p in hat.past.items()}
    images, labels = picture_task(2).train
    model.train()
    torch.manual_seed(0)
    loss = hat.loss(images, labels, 2)
    slope, above, below = 1 / 400, 0.0, 0.0
    for name, past in hat.past.items():
        for e, a in zip(hat.embeddings[name][2].tolist(), past.tolist(), strict=True):
            above += 1 / (1 + math.exp(-slope * e)) * (1 - a)
            below += 1 - a
    torch.manual_seed(0)
    expected = F.cross_entropy(model(images, 2), labels) + 0.6 * above / below
    assert_close(loss, expected)


def test_gradients_of_weights_in_use_are_held_back():
    model = Residual()
    hat = ready(model)
    random = torch.Generator().manual_seed(1)
    past = {name: torch.rand(p.shape, generator=random, dtype=p.dtype) for name, p in hat.past.items()}
    hat.past = past
    model.eval()
    hat.loss(*picture_task(1).train, 1).backward()
    expected = gradients(model)
    hat.scale_gradients(1)
    found = gradients(model)
    channel = torch.maximum(past["stem"], past["conv1"])  # after the residual sum
    for i in range(4):
        expected["stem.weight"][i] *= 1 - past["stem"][i]  # the images are always in use
        for j in range(4):
            expected["conv1.weight"][i, j] *= 1 - min(past["conv1"][i], past["stem"][j])
        for name in ("bn_stem.weight", "bn_stem.bias"):
            expected[name][i] *= 1 - past["stem"][i]
        for name in ("bn1.weight", "bn1.bias", "conv1.bias"):
            expected[name][i] *= 1 - past["conv1"][i]
    for i in range(6):
        for j in range(16):  # four positions a channel
            expected["fc.weight"][i, j] *= 1 - min(past["fc"][i], channel[j // 4])
    for name, value in expected.items():
        if not name.startswith("hat"):
            assert_close(found[name], value, msg=name)


@pytest.mark.parametrize(("stem", "conv1"), [(0.9, 0.2), (0.2, 0.9)])
def test_an_input_that_several_layers_feed_is_in_use_if_one_of_their_units_is(stem, conv1):
    hat = ready(Residual())
    hat.past |= {"stem": torch.full((4,), stem).double(), "conv1": torch.full((4,), conv1).double()}
    hat.past["fc"] = torch.ones(6).double()
    factors = {id(parameter): factor for parameter, factor in hat.factors()}
    assert_close(factors[id(hat.model.fc.weight)], torch.full((6, 16), 1 - 0.9).double())


def test_embedding_gradients_are_compensated():
    model = Residual()
    hat = ready(model, hat_smax=30.0)
    with torch.no_grad():
        hat.embeddings["fc"][1, 0] = 5.9  # past the clamp of cosh at full slope
    images, labels = picture_task(1).train
    for n_before in (0, 2):
        hat.step = n_before
        model.eval()
        hat.loss(images, labels, 1).backward()
        before, s = gradients(model), hat.slope
        hat.scale_gradients(1)
        for k, (name, embedding) in enumerate(hat.embeddings.items()):
            for i, e in enumerate(embedding[1].tolist()):
                held = max(-50.0, min(50.0, s * e))
                factor = 30.0 / s * (math.cosh(held) + 1) / (math.cosh(e) + 1)
                expected = before[f"hat_embeddings.{k}"][1, i] * factor
                assert embedding.grad[1, i].item() == pytest.approx(expected.item(), rel=1e-9), name
            assert (embedding.grad[[0, 2]] == 0).all()
        model.zero_grad()


def test_old_outputs_stay_where_their_units_are_gated():
    model = Residual()
    hat = ready(model)
    with torch.no_grad():
        for embedding in hat.embeddings.values():  # every other unit for task 0
            embedding[0] = torch.tensor([6.0, -6.0]).repeat(embedding.shape[1] // 2)
    train(hat, 0, n_steps=3)
    hat.after_task(0, picture_task(0))
    used = torch.cat(list(hat.past.values()))
    assert ((used == 0) | (used == 1)).all()
    assert 0 < used.mean() < 1
    images = picture_task(0).test.images
    model.eval()
    with torch.no_grad():
        before, other = model(images, 0), model(images, 1)
    train(hat, 1, n_steps=9)
    model.eval()
    with torch.no_grad():
        assert_close(model(images, 0), before, atol=0, rtol=0)
        assert (model(images, 1) - other).abs().max() > 0.01  # while the rest learned


def test_embeddings_are_kept_in_range_and_cumulative_gates_only_rise():
    hat = ready(Residual())
    with torch.no_grad():
        hat.embeddings["fc"][0, :2] = torch.tensor([60.0, -60.0])
    hat.after_step(0)
    assert hat.embeddings["fc"][0, :2].tolist() == [6.0, -6.0]
    hat.after_task(0, picture_task(0))
    first = hat.past
    hat.after_task(1, picture_task(1))
    for name, gate in hat.past.items():
        own = torch.sigmoid(400 * hat.embeddings[name][1])
        assert_close(gate, torch.maximum(first[name], own))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LayerNorm(12), "hat cannot protect norm.weight: it belongs to no unit"),
        (nn.Conv1d(1, 2, 1, groups=1), "layer norm did not run"),
        (nn.ConvTranspose1d(2, 2, 1), r"^hat is for layers of the kinds .*; not for norm \(transposed convolution\)$"),
        (nn.Conv1d(2, 2, 1, groups=2), "cannot gate layer norm: it is a convolution in groups"),
    ],
)
def test_refuses_what_it_cannot_gate(layer, message):
    model = tiny.Network()
    model.norm = layer
    model.forward = lambda images, task: model.heads[task](model.fc2(model.fc1(images)))
    with pytest.raises(InputError, match=message):
        hat = method(model, "hat")
        with hat.learning(0, tiny.task(0)):
            pass


def test_refuses_one_head_for_all_tasks():
    model = tiny.Network()
    del model.heads
    with pytest.raises(InputError, match="^hat is for networks with a head for each task; Network has one for all$"):
        method(model, "hat")
