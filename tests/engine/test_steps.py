"""Every form of the training step takes the same steps."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from engine.method import Method
from engine.options import Options
from engine.steps import EagerSteps, FusedSteps, GraphSteps, make_steps
from engine.task import Split, Task
from methods.gpm import GPM
from methods.naive import Naive
from models import MLP, AlexNet, ResNet18

N_INPUTS, N_CLASSES, BATCH, LR = 9, 4, 5, 0.1


class Chain(nn.Module):
    """Linear layers with a ReLU between them."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes))

    @property
    def relu_chain(self) -> list[nn.Linear]:
        return list(self.layers)

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        for layer in self.layers[:-1]:
            images = F.relu(layer(images))
        return self.layers[-1](images)


def chain_task(n: int, dtype: torch.dtype = torch.float64) -> Task:
    random = torch.Generator().manual_seed(n)
    images = torch.randn(n, N_INPUTS, dtype=torch.float64, generator=random).to(dtype)
    split = Split(images, torch.randint(N_CLASSES, (n,), generator=random))
    return Task("random", N_CLASSES, split, split, split)


def options(**changes) -> Options:
    return dataclasses.replace(Options(), batch_size_train=BATCH, lr=LR, device="cpu", **changes)


def remember(method: GPM, columns: list[int]) -> None:
    """Give every layer a random basis of so many columns, as after a task."""
    random = torch.Generator().manual_seed(7)
    for (key, d), k in zip(method.memory.input_sizes.items(), columns, strict=True):
        basis = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=random)).Q[:, :k]
        method.memory.bases[key] = basis.to(method.memory.bases[key].device)
    method.memory.n_updates = 1


def train(model: nn.Module, task: Task, step: str, columns: list[int] | None):
    """Two epochs; returns the form of the steps, the losses and the weights."""
    opts = options(step=step)
    method = Naive(model, opts) if columns is None else GPM(model, opts)
    if columns is not None:
        remember(method, columns)
    with method.learning(1, task):
        optimizer = method.optimizer(1, LR)
        steps = make_steps(method, optimizer, 1, task)
        losses = []
        for epoch in range(2):
            order = torch.randperm(len(task.train.labels), generator=torch.Generator().manual_seed(epoch))
            optimizer.param_groups[0]["lr"] = LR / (epoch + 1)
            losses.append(steps.epoch(order))
    return type(steps), losses, [p.detach().clone() for p in model.parameters()]


def compare(sizes: list[int], n: int, columns: list[int] | None, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """The same epochs by hand and eagerly; returns how far each layer moved, weight by weight."""
    results = {}
    for step in ("auto", "eager"):
        torch.manual_seed(3)
        model = Chain(sizes).to(dtype)
        before = [p.detach().clone() for p in model.parameters()]
        results[step] = train(model, chain_task(n, dtype), step, columns)
    (by_hand, losses, weights), (eager, eager_losses, eager_weights) = results["auto"], results["eager"]
    assert (by_hand, eager) == (FusedSteps, EagerSteps)
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    assert_close(weights, eager_weights, **tolerance)
    assert_close(losses, eager_losses, **tolerance)
    return [after - start for after, start in zip(weights, before, strict=True)]


@pytest.mark.parametrize("n", [20, 18, 21, 3, 1], ids=["even", "odd", "single_image_merged", "small", "one_image"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_by_hand_equals_eager_for_every_last_batch(n, dtype):
    compare([N_INPUTS, 8, 6, N_CLASSES], n, [4, 3, 2], dtype)


@pytest.mark.parametrize("sizes", [[9, 4], [9, 8, 4], [9, 8, 7, 4], [9, 8, 7, 6, 4]], ids=len)
def test_by_hand_equals_eager_for_every_number_of_layers(sizes):
    compare(sizes, 18, [d // 2 for d in sizes[:-1]])
    compare(sizes, 18, None)


@pytest.mark.parametrize("columns", list(itertools.product([0, 3, 9], [0, 4, 8], [0, 5, 6])), ids=str)
def test_by_hand_equals_eager_from_empty_to_full(columns):
    sizes = [N_INPUTS, 8, 6, N_CLASSES]
    moved = compare(sizes, 18, list(columns))
    for change, k, d in zip(moved, columns, sizes, strict=False):
        assert change.any() == (k < d)


def test_by_hand_equals_eager_on_the_thin_routes_of_wide_layers():
    torch.manual_seed(0)
    images = torch.rand(45, 784)
    split = Split(images, torch.randint(10, (45,)))
    task = Task("wide", 10, split, split, split)
    results = []
    for step in ("auto", "eager"):
        torch.manual_seed(1)
        results.append(train(MLP(n_hidden=200), task, step, [700, 30, 190])[1:])
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_by_hand_updates_stay_orthogonal_to_the_basis():
    torch.manual_seed(3)
    model = Chain([N_INPUTS, 8, N_CLASSES]).double()
    before = [p.detach().clone() for p in model.parameters()]
    method = GPM(model, options())
    remember(method, [4, 3])
    with method.learning(1, chain_task(18)):
        optimizer = method.optimizer(1, LR)
        make_steps(method, optimizer, 1, chain_task(18)).epoch(torch.arange(18))
    for parameter, start, basis in zip(model.parameters(), before, method.memory.bases.values(), strict=True):
        assert (parameter - start).abs().max() > 1e-3
        assert ((parameter - start) @ basis).abs().max() < 1e-14


@pytest.mark.parametrize("change", [{"step": "eager"}, {"momentum": 0.9}, {"amp": "bf16"}], ids=str)
def test_what_does_not_fit_by_hand_runs_eagerly(change):
    method = Naive(Chain([N_INPUTS, N_CLASSES]), options(**change))
    optimizer = method.optimizer(0, LR)
    assert type(make_steps(method, optimizer, 0, chain_task(5))) is EagerSteps


class Smooth(Chain):
    """Says that it is a chain of ReLUs, and is not."""

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        for layer in self.layers[:-1]:
            images = torch.tanh(layer(images))
        return self.layers[-1](images)


class Dropped(Chain):
    """A chain, but for training."""

    def forward(self, images: Tensor, task: int = 0) -> Tensor:
        return super().forward(F.dropout(images, 0.5, self.training), task)


def frozen_below() -> Chain:
    model = Chain([N_INPUTS, 8, N_CLASSES])
    model.layers[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "make", [lambda: Smooth([N_INPUTS, 8, N_CLASSES]), lambda: Dropped([N_INPUTS, 8, N_CLASSES]), frozen_below]
)
def test_a_network_that_is_not_what_it_says_runs_eagerly(make):
    method, task = Naive(make(), options()), chain_task(5, torch.float32)
    state = torch.get_rng_state()
    optimizer = method.optimizer(0, LR)
    assert type(make_steps(method, optimizer, 0, task)) is EagerSteps
    assert_close(torch.get_rng_state(), state)


def test_a_method_that_moves_some_weights_only_runs_eagerly():
    class Last(Naive):
        def parameters(self, t):
            return list(self.model.layers[-1].parameters())

    method = Last(Chain([N_INPUTS, 8, N_CLASSES]), options())
    optimizer = method.optimizer(0, LR)
    assert type(make_steps(method, optimizer, 0, chain_task(5, torch.float32))) is EagerSteps


def test_groups_with_rates_of_their_own_run_eagerly():
    method = Naive(Chain([N_INPUTS, 8, N_CLASSES]), options())
    first, last = ({"params": layer.weight, "lr": lr} for layer, lr in zip(method.model.layers, (LR, 0.0), strict=True))
    task = chain_task(5, torch.float32)
    assert type(make_steps(method, torch.optim.SGD([first, last], lr=LR), 0, task)) is EagerSteps


def test_an_optimizer_whose_state_a_rehearsal_would_change_runs_eagerly(monkeypatch):
    monkeypatch.setattr(Tensor, "device", torch.device("cuda"))
    method = Naive(Chain([N_INPUTS, 8, N_CLASSES]), options())
    steps = [
        make_steps(method, kind(method.parameters(0), LR), 0, chain_task(5))
        for kind in (torch.optim.SGD, torch.optim.Adam)
    ]
    assert [type(each) for each in steps] == [GraphSteps, EagerSteps]


def test_a_method_with_a_step_of_its_own_runs_eagerly():
    class Doubled(Method):
        name = "doubled"

        def loss(self, images, labels, t):
            return 2 * super().loss(images, labels, t)

    method = Doubled(Chain([N_INPUTS, N_CLASSES]), options())
    optimizer = method.optimizer(0, LR)
    assert type(make_steps(method, optimizer, 0, chain_task(5, torch.float32))) is EagerSteps


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def picture_task(n: int, n_classes: int = 10) -> Task:
    random = torch.Generator().manual_seed(n)
    split = Split(torch.randn(n, 3, 32, 32, generator=random), torch.randint(n_classes, (n,), generator=random)).to(
        "cuda"
    )
    return Task("pictures", n_classes, split, split, split)


@cuda
@pytest.mark.parametrize("n", [20, 18, 21], ids=["even", "odd", "single_image_merged"])
def test_a_cuda_graph_equals_eager(n):
    results = {}
    for step in ("auto", "eager"):
        torch.manual_seed(0)
        model = ResNet18([10, 10]).to("cuda")
        columns = [layer.weight[0].numel() // 2 for layer in model.modules() if isinstance(layer, nn.Conv2d)]
        results[step] = train(model, picture_task(n), step, columns)
    assert (results["auto"][0], results["eager"][0]) == (GraphSteps, EagerSteps)
    assert_close(results["auto"][1:], results["eager"][1:], rtol=1e-3, atol=1e-4)


@cuda
def test_a_cuda_graph_draws_a_new_dropout_mask_at_every_step():
    method, task = Naive(AlexNet([10, 10]).to("cuda"), options()), picture_task(20)
    steps = make_steps(method, torch.optim.SGD(method.parameters(1), lr=1e-30), 1, task)
    losses = [steps.epoch(torch.arange(20)) for _ in range(3)]  # the same graph, and no weight moves
    assert type(steps) is GraphSteps
    assert len(steps.graphs) == 1
    assert len(set(losses)) == 3


class Unfinished:
    """Stands for a device's generator: after a failed capture it takes itself to be captured."""

    def __init__(self, capturing: bool = True) -> None:
        self.capturing = capturing

    def clone_state(self):
        return Unfinished(capturing=False)

    def graphsafe_set_state(self, state) -> None:
        self.capturing = state.capturing


def test_a_failed_capture_gives_the_generator_back_before_the_next_eager_step(monkeypatch):
    """Faked on a CPU: eager dropout would raise while the generator takes itself to be captured."""
    generator, steps_taken = Unfinished(), []

    class Steps(GraphSteps):
        def capture(self, images, labels):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def step(self, images, labels):
            assert not generator.capturing
            steps_taken.append(len(images))
            return super().step(images, labels)

    monkeypatch.setattr(torch.cuda, "default_generators", [generator])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    method, task = Naive(Chain([N_INPUTS, N_CLASSES]).double(), options()), chain_task(10)
    steps = Steps(method, method.optimizer(0, LR), 0, task.train)
    with pytest.warns(UserWarning, match=r"^no CUDA graph \(operation not permitted .*\); training eagerly$"):
        steps.epoch(torch.arange(10))
    steps.epoch(torch.arange(10))  # it does not try again
    assert steps_taken == [5, 5, 5, 5]


@cuda
def test_a_failed_capture_falls_back_to_eager(monkeypatch):
    def fail(*_):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(GraphSteps, "capture", fail)
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="training eagerly"):
        _, losses, _ = train(ResNet18([10, 10]).to("cuda"), picture_task(10), "auto", None)
    torch.manual_seed(0)
    expected = train(ResNet18([10, 10]).to("cuda"), picture_task(10), "eager", None)[1]
    assert_close(losses, expected, rtol=1e-3, atol=1e-4)
