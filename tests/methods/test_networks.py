"""GPM and its successors on networks that the benchmarks do not have: attention, embeddings, other BatchNorms."""

import pytest
import torch
from torch import Tensor, nn

from engine.task import Split, Task
from gradproj.errors import InputError
from methods import METHODS
from methods.gpm import GPM
from methods.parts.side_paths import SidePathGPM
from tests.tiny import N_CLASSES, N_INPUTS
from tests.tiny_nets import learn, method, picture_task

FAMILY = [name for name, kind in METHODS.items() if issubclass(kind, GPM)]
EXACT = ["gpm", "dual_gpm", "dfgp"]  # with ε = 1 nothing that old tasks use moves


class Attention(nn.Module):
    """An image as four tokens that attend to each other."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(N_INPUTS // 4, 1, batch_first=True)
        self.head = nn.Linear(N_INPUTS // 4, N_CLASSES)
        self.double()

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        tokens = images.unflatten(1, (4, -1))
        return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, N_CLASSES)

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        return self.head(self.table(images).mean(1))


class Running(nn.Module):
    """BatchNorm with running statistics and a head for each task."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(6, 3) for _ in range(3))
        self.double()

    def forward(self, images: Tensor, task: int) -> Tensor:
        return self.heads[task](self.body(images))


class Sequential(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        return self.net(images)


@pytest.mark.parametrize("name", FAMILY)
def test_attention(name):
    if issubclass(METHODS[name], SidePathGPM):
        with pytest.raises(
            InputError, match=rf"^{name} is for layers of the kinds Linear, .*; not for attention \(attention\)$"
        ):
            method(Attention(), name)
        return
    learner = method(Attention(), name, threshold=(1.0,))
    for t in range(2):
        before = {key: value.clone() for key, value in learner.model.state_dict().items()}
        learn(learner, t)
    leaks = learner.memory.leak(before)
    assert len(leaks) == 3, "the projections of queries, keys and values share a basis, and so a key"
    if name in EXACT:
        assert max(leak or 0 for leak in leaks.values()) < 1e-9


@pytest.mark.parametrize("name", FAMILY)
def test_embeddings(name):
    if issubclass(METHODS[name], SidePathGPM) or not METHODS[name].embeddings:
        message = r"needs layers with a basis, and embeddings have none: table$|not for table \(embedding\)$"
        with pytest.raises(InputError, match=message):
            method(Words(), name)
        return
    words = torch.randint(9, (6, 3), generator=torch.Generator().manual_seed(0))
    split = Split(words, torch.arange(6) % N_CLASSES)
    learner = method(Words(), name)
    learner.after_task(0, Task("words", N_CLASSES, split, split, split))
    assert learner.memory.bases["table"].tolist() == sorted(set(words.flatten().tolist()))


class Functional(nn.Module):
    """Applies a weight in its parent's forward, where hooks on its own module see nothing."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.head = nn.Linear(N_INPUTS, 6), nn.Linear(6, N_CLASSES)
        self.double()

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        return self.head(torch.relu(nn.functional.linear(images, self.fc.weight, self.fc.bias)))


@pytest.mark.parametrize("name", ["owm", *(name for name in FAMILY if issubclass(METHODS[name], SidePathGPM))])
def test_a_weight_applied_where_hooks_do_not_see_it_is_refused_before_training(name):
    with pytest.raises(InputError, match=f"^{name} sees what layers compute in their own forward; weights of fc are"):
        learn(method(Functional(), name), 0, steps=0)


@pytest.mark.parametrize("network", [Attention, Words])
def test_owm_refuses_layers_that_it_does_not_know(network):
    with pytest.raises(InputError, match=r"^owm is for layers of the kinds .*; not for (attention|table) \("):
        method(network(), "owm")


@pytest.mark.filterwarnings("ignore:running statistics of body.2 go on moving")
@pytest.mark.parametrize("name", ["er", "a_gem", "fs_dgpm", "multitask"])
def test_replay_where_batchnorm_has_running_statistics(name):
    if name == "multitask":
        order = method(Running(), name).order(torch.tensor([[0, 0], [1, 0], [0, 1]]), torch.Generator())
        assert sorted(order.tolist()) == [0, 1], "an image left over alone has no batch statistics"
        return
    learner = method(Running(), name, replay_batch=3)
    for t in range(3):
        task = picture_task(t)
        learner.before_task(t, task)
        with learner.learning(t, task):
            learner.model.train()
            for step in range(8):
                torch.manual_seed(step)
                learner.model.zero_grad()
                learner.backward(task.train.images[:4], task.train.labels[:4], t)
        learner.after_task(t, task)


def test_a_layer_whose_weight_is_frozen_and_whose_bias_is_not():
    moved = {}
    for name in ("gpm", "fs_dgpm"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(N_INPUTS, 5), nn.ReLU(), nn.Linear(5, N_CLASSES)).double()
        net[0].weight.requires_grad_(False)
        model = Sequential(net)
        learner = method(model, name, threshold=(1.0,))
        learn(learner, 0)
        before = net[0].bias.clone()
        learn(learner, 1)
        moved[name] = (net[0].bias - before).norm()
    assert moved["gpm"] == 0
    assert moved["fs_dgpm"] < 1e-3
