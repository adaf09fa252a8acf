"""Learning one task: the schedule, the batches, the best weights, and what randomness may decide."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from engine import experiment
from engine.evaluation import evaluate
from engine.interrupts import Stopped
from engine.method import Method
from engine.standing import Plateau
from engine.task import Benchmark, Split, Task, batches
from gradproj.errors import DivergenceError
from methods import METHODS
from models import MLP
from tests import tiny
from tests.tiny import run
from tests.tiny_nets import method as make

pytestmark = pytest.mark.usefixtures("quick")


class TestPlateau:
    def test_hand_worked_trace(self):
        schedule = Plateau(lr=0.1, lr_min=0.03, factor=2, patience=2)
        trace = [  # validation loss, improved, next lr, finished
            (1.0, True, 0.1, False),
            (1.0, False, 0.1, False),  # equal is no better
            (1.1, False, 0.05, False),  # the second in a row: lr falls
            (1.05, False, 0.05, False),  # patience has started again
            (0.9, True, 0.05, False),
            (0.95, False, 0.05, False),
            (0.91, False, 0.025, True),  # below lr_min: the task ends before using it
        ]
        for place, (loss, improved, lr, finished) in enumerate(trace):
            assert schedule.step(loss) == improved, place
            assert schedule.lr == pytest.approx(lr), place
            assert schedule.finished == finished, place

    def test_an_improvement_resets_patience(self):
        schedule = Plateau(lr=1.0, lr_min=0.1, factor=2, patience=3)
        for loss in (5, 6, 6, 4, 6, 6, 3, 6, 6):
            schedule.step(loss)
        assert schedule.lr == 1.0
        schedule.step(6)
        assert schedule.lr == 0.5

    def test_lr_min_itself_is_used(self):
        schedule = Plateau(lr=0.5, lr_min=0.25, factor=2, patience=1)
        schedule.step(1.0)
        schedule.step(1.0)
        assert (schedule.lr, schedule.finished) == (0.25, False)
        schedule.step(1.0)
        assert schedule.finished

    def test_not_a_number_is_no_improvement(self):
        schedule = Plateau(lr=0.5, lr_min=0.1, factor=2, patience=1)
        assert not schedule.step(math.nan)
        assert schedule.lr == 0.25


@pytest.mark.parametrize(
    ("n", "batch_size", "expected"),
    [
        (10, 4, [(0, 4), (4, 8), (8, 10)]),
        (8, 4, [(0, 4), (4, 8)]),
        (9, 4, [(0, 4), (4, 9)]),  # a single image joins the batch before it
        (5, 4, [(0, 5)]),
        (3, 4, [(0, 3)]),
        (1, 4, [(0, 1)]),
        (0, 4, []),
    ],
)
def test_batches(n, batch_size, expected):
    assert list(batches(n, batch_size)) == expected


class Scripted(nn.Module):
    """A network whose validation losses are given; its one weight moves by 1 with every batch.

    Validation images are 1, all others 0.
    """

    def __init__(self, valid_losses: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.idle = nn.Linear(1, 1)  # something to protect
        self.valid_losses, self.weights = iter(valid_losses), []

    def forward(self, images: Tensor, task: int) -> Tensor:
        logits = torch.zeros(len(images), 2)
        if self.training:
            return logits + 0.0 * (self.weight + self.idle(images))
        if images.all():
            self.weights.append(self.weight.item())
            logits[:, 1] = math.log(math.expm1(next(self.valid_losses)))  # cross-entropy of class 0 is log(1 + exp)
        return logits


def count_steps(model: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    step = torch.optim.SGD.step

    def step_and_count(optimizer, *args):
        step(optimizer, *args)
        with torch.no_grad():
            model.weight += 1

    monkeypatch.setattr(torch.optim.SGD, "step", step_and_count)


@pytest.fixture
def scripted_benchmark() -> Benchmark:
    def split(n: int, value: float) -> Split:
        return Split(torch.full((n, 1), value), torch.zeros(n, dtype=torch.int64))

    task = Task("scripted", 2, split(4, 0.0), split(2, 1.0), split(2, 0.0))
    return Benchmark("scripted", "embedded", [task, task])


def test_training_follows_the_schedule(tmp_path, scripted_benchmark, monkeypatch):
    """And leaves the weights of the best validation loss, the first of equal ones."""
    losses = [1.0, 0.8, 0.8, 0.9, 0.85, 0.81]  # best at epoch 2; lr falls after epochs 4 and 6, which ends the task
    model = Scripted([*losses, 0.7, *losses, 0.7, 0.7])  # after each task, those so far are measured once more
    count_steps(model, monkeypatch)
    options = tiny.options(
        tmp_path, method="naive", n_tasks=2, n_epochs=50, lr=0.4, lr_min=0.15, lr_factor=2, lr_patience=2
    )
    run(options, scripted_benchmark, model)
    rates = [(epoch["task"], epoch["lr"]) for epoch in tiny.epochs(tmp_path)]
    assert rates == [(t, lr) for t in (0, 1) for lr in (0.4, 0.4, 0.4, 0.4, 0.2, 0.2)]
    # One batch an epoch: the weight counts them. Task 2 starts from the best of task 1.
    assert model.weights == [1, 2, 3, 4, 5, 6] + [2] + [3, 4, 5, 6, 7, 8] + [4, 4]
    assert model.weight.item() == 4


def test_constant_schedule_keeps_rate_and_last_weights(tmp_path, scripted_benchmark, monkeypatch):
    model = Scripted([0.5, 0.4, *[0.6] * 5])
    count_steps(model, monkeypatch)
    options = tiny.options(tmp_path, method="naive", schedule="constant", lr=0.3, lr_patience=1, n_epochs=6, n_tasks=1)
    run(options, scripted_benchmark, model)
    assert [epoch["lr"] for epoch in tiny.epochs(tmp_path)] == [0.3] * 6
    assert model.weight.item() == 6  # not 2, the best


@pytest.mark.parametrize("make", [tiny.Network, lambda: MLP(tiny.N_INPUTS, 8, tiny.N_CLASSES).double()])
def test_training_loss_is_the_mean_over_images(tmp_path, make):
    torch.manual_seed(0)
    model, benchmark = make(), tiny.benchmark(1, n_train=11)  # batches of 4, 4 and 3
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if isinstance(model, tiny.Network):
        model.norm = nn.Identity()
    images, labels = benchmark.tasks[0].train
    expected = F.cross_entropy(model(images, 0), labels).item()
    # A rate so small that no weight moves.
    run(tiny.options(tmp_path, n_tasks=1, n_epochs=1, batch_size_train=4, lr=1e-30, lr_min=1e-40), benchmark, model)
    assert tiny.epochs(tmp_path)[0]["train_loss"] == pytest.approx(expected, rel=1e-9)


def test_only_the_current_head_is_trained(tmp_path):
    model, benchmark = tiny.Network(), tiny.benchmark()
    before = {name: p.clone() for name, p in model.named_parameters()}
    run(tiny.options(tmp_path, n_tasks=2, momentum=0.5), benchmark, model)
    assert [torch.equal(p, before[f"heads.{name}"]) for name, p in model.heads.named_parameters()] == [
        False,
        False,
        True,
    ]
    assert not torch.equal(model.fc1.weight, before["fc1.weight"])


def test_the_optimiser_holds_shared_weights_and_the_current_head():
    model = tiny.Network()
    model.norm.weight.requires_grad_(False)
    names = {id(p): name for name, p in model.named_parameters()}
    shared = ["fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "norm.bias"]
    assert [names[id(p)] for p in make(model, "naive").parameters(1)] == [*shared, "heads.1.weight"]


class Recorder(tiny.Network):
    """Writes down which images it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, Tensor]] = []

    def forward(self, images: Tensor, task: int) -> Tensor:
        if self.training:
            self.seen.append((task, images))
        return super().forward(images, task)

    def order(self, benchmark: Benchmark, n_epochs: int) -> dict[tuple[int, int], list[int]]:
        """By task and epoch, the places of the images."""
        order = {}
        for t in {t for t, _ in self.seen}:
            images = torch.cat([images for s, images in self.seen if s == t])
            places = (images[:, None] == benchmark.tasks[t].train.images).all(2).long().argmax(1)
            order |= {(t, epoch): part.tolist() for epoch, part in enumerate(places.chunk(n_epochs))}
        return order


def test_order_depends_on_seed_task_and_epoch_alone(tmp_path):
    benchmark = tiny.benchmark()

    def order(n_epochs: int, **changes) -> dict[tuple[int, int], list[int]]:
        model = Recorder()
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        run(tiny.options(path, n_epochs=n_epochs, schedule="constant", **changes), benchmark, model)
        return model.order(benchmark, n_epochs)

    first = order(3)
    assert len(first) == 9
    assert all(sorted(places) == list(range(30)) for places in first.values())  # each image once an epoch
    assert len({tuple(places) for places in first.values()}) == 9  # in a new order each time
    other = order(2, batch_size_train=7, batch_size_test=5, lr=0.01, method="naive", n_tasks=2)
    assert other == {place: first[place] for place in other}
    assert all(places != first[place] for place, places in order(2, seed=7).items())


class TestEvaluate:
    def test_loss_and_accuracy(self):
        split = tiny.task(0).test
        model = tiny.Network()
        model.norm = nn.Identity()
        loss, accuracy = evaluate(model, 0, split, 7)
        model.eval()
        logits = model(split.images, 0)
        assert loss == pytest.approx(F.cross_entropy(logits, split.labels).item(), rel=1e-12)
        assert accuracy == pytest.approx(100 * (logits.argmax(1) == split.labels).double().mean().item())

    def test_in_batches_of_the_given_size_in_stored_order(self):
        split, seen = tiny.task(0).test, []
        model = tiny.Network()
        model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        evaluate(model, 0, split, 16)
        assert [len(batch) for batch in seen] == [16, 16, 8]
        assert torch.equal(torch.cat(seen), split.images)

    def test_draws_no_randomness_and_no_gradient(self):
        model = tiny.Network()
        before = torch.get_rng_state()
        evaluate(model, 0, tiny.task(0).test, 16)
        assert torch.equal(torch.get_rng_state(), before)
        assert all(p.grad is None for p in model.parameters())

    @pytest.mark.parametrize("changes", [{"batch_size_test": 5}, {"eval_train": True}], ids=str)
    def test_does_not_change_training(self, tmp_path, changes):
        models = [tiny.Network() for _ in range(2)]
        for i, each in enumerate([{}, changes]):
            options = tiny.options(tmp_path / str(i), schedule="constant", **each)
            run(options, tiny.benchmark(), models[i])
        assert_close(models[0].state_dict(), models[1].state_dict(), atol=0, rtol=0)


@pytest.mark.parametrize("method", ["gpm", "naive"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_fast_step_of_the_perceptron_is_the_plain_one(tmp_path, method, dtype):
    benchmark, models, losses = tiny.benchmark(dtype=dtype), [], []
    for step in ("auto", "eager"):
        torch.manual_seed(0)
        models.append(MLP(tiny.N_INPUTS, 8, tiny.N_CLASSES).to(dtype))
        # Thresholds that leave a layer open, one partly so and one closed, once two tasks are learned.
        changes = {"step": step, "method": method, "threshold": (0.6, 0.9, 0.98), "batch_size_train": 7}
        options = tiny.options(tmp_path / step, **changes)
        run(options, benchmark, models[-1])
        losses.append([epoch["train_loss"] for epoch in tiny.epochs(tmp_path / step)])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-4
    assert_close(models[0].state_dict(), models[1].state_dict(), atol=tolerance, rtol=tolerance)
    assert losses[0] == pytest.approx(losses[1], rel=10 * tolerance)


def test_a_method_knows_the_rate_of_the_epoch(tmp_path, scripted_benchmark, monkeypatch):
    rates = []

    class Watching(METHODS["naive"]):
        def loss(self, images, labels, t):
            rates.append(self.lr)
            return super().loss(images, labels, t)

    model = Scripted([1.0, 1.0, 1.0, 1.0, 1.0, 0.5])
    options = tiny.options(tmp_path, method="naive", n_tasks=1, lr=0.4, lr_min=0.15, lr_factor=2, n_epochs=9)
    experiment.run(options, scripted_benchmark, model, Watching(model, options))
    assert rates == [0.4, 0.4, 0.2] == [epoch["lr"] for epoch in tiny.epochs(tmp_path)]


def test_parameter_groups_keep_their_own_rates_and_fall_with_the_schedule(tmp_path, scripted_benchmark):
    rates = []

    class TwoRates(Method):
        name = "two_rates"

        def optimizer(self, t, lr):
            groups = [{"params": [self.model.weight]}, {"params": self.model.idle.parameters(), "lr": 0.3}]
            self.adam = torch.optim.Adam(groups, lr=lr)
            return self.adam

        def after_step(self, t):
            rates.append([group["lr"] for group in self.adam.param_groups])

    model = Scripted([1.0, 1.0, 1.0, 1.0, 0.5])
    options = tiny.options(tmp_path, method="naive", n_tasks=1, lr=0.4, lr_min=0.15, lr_factor=2, n_epochs=9)
    experiment.run(options, scripted_benchmark, model, TwoRates(model, options))
    assert rates == [[0.4, 0.3], [0.4, 0.3], [0.2, 0.15]]


class Decaying(Method):
    """Takes a tenth of its rate away at every step, beside the schedule."""

    name = "decaying"

    def __init__(self, model, options):
        super().__init__(model, options)
        self.rates, self.stops_at = [], None

    def optimizer(self, t, lr):
        self.sgd = super().optimizer(t, lr)
        return self.sgd

    def after_step(self, t):
        self.rates.append(self.sgd.param_groups[0]["lr"])
        if len(self.rates) == self.stops_at:
            raise Stopped(2)
        self.sgd.param_groups[0]["lr"] *= 0.9


def test_rates_that_a_method_changes_stay_changed(tmp_path):
    """From epoch to epoch, and in a run that is stopped in the middle of one."""
    options = tiny.options(tmp_path, n_tasks=1, schedule="constant", lr=0.4)
    rates = []
    for stops_at in (6, None):
        method = Decaying(tiny.Network(1), options)
        method.stops_at = stops_at
        with pytest.raises(Stopped) if stops_at else nullcontext():
            experiment.run(options, tiny.benchmark(1), method.model, method)
        rates.append(method.rates)
    expected = [0.4 * 0.9**i for i in range(12)]
    assert rates == [pytest.approx(expected[:6]), pytest.approx(expected[4:])]


@pytest.mark.parametrize("stops_at", [3, 4, 5])
def test_a_run_goes_on_at_the_rate_it_had(tmp_path, scripted_benchmark, stops_at):
    """Stopped in an epoch whose rate has fallen, or falls at its beginning: 0.4, 0.4, 0.2, 0.1, 0.05, one step each."""

    class Steady(Decaying):
        name = "steady"

        def after_step(self, t):
            super().after_step(t)
            self.sgd.param_groups[0]["lr"] /= 0.9

    options = tiny.options(tmp_path, method="naive", n_tasks=1, lr=0.4, lr_min=0.04, lr_factor=2, n_epochs=9)
    for stop in (stops_at, None):
        model = Scripted([1.0] * 99)
        method = Steady(model, options)
        method.stops_at = stop
        with pytest.raises(Stopped) if stop else nullcontext():
            experiment.run(options, scripted_benchmark, model, method)
    assert method.rates == pytest.approx([0.4, 0.4, 0.2, 0.1, 0.05][stops_at - 1 :])


def test_a_warm_up_of_the_methods_own_begins_where_it_says(tmp_path):
    class Warming(Decaying):
        name = "warming"

        def optimizer(self, t, lr):
            self.sgd = super().optimizer(t, lr)
            self.scheduler = torch.optim.lr_scheduler.LinearLR(self.sgd, start_factor=0.25, total_iters=3)
            return self.sgd

        def after_step(self, t):
            self.rates.append(self.sgd.param_groups[0]["lr"])
            self.scheduler.step()

    options = tiny.options(tmp_path, n_tasks=1, schedule="constant", lr=0.4)
    method = Warming(tiny.Network(1), options)
    experiment.run(options, tiny.benchmark(1), method.model, method)
    assert method.rates == pytest.approx([0.1, 0.2, 0.3, *[0.4] * 9])


def test_every_task_begins_at_the_first_rate(tmp_path, scripted_benchmark):
    """Also where one optimiser serves all tasks, whose rate the schedule has divided."""

    class Lasting(Decaying):
        name, state = "lasting", ("sgd",)

        def __init__(self, model, options):
            super().__init__(model, options)
            self.sgd = torch.optim.SGD(model.parameters(), lr=options.lr)

        def optimizer(self, t, lr):
            return self.sgd

    model = Scripted([1.0, 1.0, 1.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.5, 0.5])
    options = tiny.options(tmp_path, method="naive", n_tasks=2, lr=0.4, lr_min=0.15, lr_factor=2, n_epochs=9)
    method = Lasting(model, options)
    experiment.run(options, scripted_benchmark, model, method)
    assert method.rates[:3] == pytest.approx([0.4, 0.4 * 0.9, 0.2 * 0.9**2])
    assert method.rates[3:5] == pytest.approx([0.4, 0.4 * 0.9])


def test_the_schedule_divides_rates_that_a_method_has_changed(tmp_path, scripted_benchmark):
    model = Scripted([1.0, 1.0, 1.0, 1.0, 0.5])
    options = tiny.options(tmp_path, method="naive", n_tasks=1, lr=0.4, lr_min=0.15, lr_factor=2, n_epochs=9)
    method = Decaying(model, options)
    experiment.run(options, scripted_benchmark, model, method)
    assert method.rates == pytest.approx([0.4, 0.4 * 0.9, 0.2 * 0.9**2])


def test_divergence_is_an_error_that_says_where(tmp_path):
    with pytest.raises(DivergenceError, match=r"no longer finite: task 1, epoch 1, step \d.*lr was 1e\+38"):
        run(tiny.options(tmp_path, lr=1e38), tiny.benchmark(), tiny.Network())
