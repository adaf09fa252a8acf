"""A continued run has all that moves outside a network's own state: unsaved buffers, frozen parameters."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from engine import experiment
from engine.folder import load_checkpoint, save_checkpoint
from engine.interrupts import Stopped
from engine.loading import load_run
from engine.method import Method
from methods.naive import Naive
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick")


class Centred(nn.Module):
    """Subtracts moving means of what it sees, in buffers of every kind: moved in place from the start, made by a first
    batch and then moved in place, and made anew by each batch."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8).double(), persistent=False)
        self.register_buffer("grown", torch.zeros(0).double(), persistent=False)
        self.register_buffer("made", None, persistent=False)
        self.register_buffer("count", torch.tensor(0), persistent=False)  # becomes a fraction
        self.register_buffer("seen", torch.zeros(0).double(), persistent=False)
        self.register_buffer("ones", torch.ones(1).double().expand(8), persistent=False)

    def forward(self, x):
        if self.training:
            mean = x.detach().mean(0)
            if self.made is None:
                self.grown, self.made = mean.clone(), mean.clone()
            for buffer in (self.mean, self.grown, self.made):
                buffer.lerp_(mean, 0.1)
            self.count = self.count + 0.3
            self.seen = torch.cat([self.seen, mean.mean()[None]])
        made = 0 if self.made is None else self.grown + self.made
        return self.ones * (x - self.mean - made - self.seen.mean().nan_to_num() - self.count / 100)


class Moving(tiny.Network):
    def __init__(self, n_tasks=3):
        super().__init__(n_tasks)
        self.fc2 = nn.Sequential(self.fc2, Centred())


class Stopping(Method):
    """Stops once where it is told."""

    stops_at, steps = "", 0

    def before_task(self, t, task):
        self.reach(f"the beginning of task {t + 1}")

    def after_step(self, t):
        self.steps += 1
        self.reach(f"step {self.steps}")

    def reach(self, place):
        if place == self.stops_at:
            raise Stopped(2)


class Plain(Stopping, Naive):
    name = "plain"


class Freezing(Stopping):
    """Learns its first layer with the first task only."""

    name = "freezing"

    def before_task(self, t, task):
        super().before_task(t, task)
        self.model.fc1.requires_grad_(t == 0)


class LateFreezing(Stopping):
    name = "late_freezing"

    def after_task(self, t, task):
        self.model.fc1.requires_grad_(False)


def run(folder, method, make, *stops, n_tasks=3, **options):
    """A method whose run is done, after stops on the way where there are to be some."""
    for stops_at in (*stops, ""):
        made = method(make(), tiny.options(folder, n_tasks=n_tasks, **options))
        made.stops_at = stops_at
        with pytest.raises(Stopped) if stops_at else nullcontext():
            experiment.run(made.options, tiny.benchmark(n_tasks), made.model, made)
    return made


def outcome(folder, made):
    """Accuracies of all epochs, and what training moved."""
    return tiny.epochs(folder), made.weights()


@pytest.mark.parametrize("make, method", [(Moving, Plain), (tiny.Network, Freezing), (tiny.Network, LateFreezing)])
@pytest.mark.parametrize("stops", [["step 18"], ["the beginning of task 2"], ["step 6", "step 2"]], ids=str)
def test_the_same_numbers_as_without_a_stop(tmp_path, make, method, stops):
    whole = run(tmp_path / "whole", method, make)
    continued = run(tmp_path / "stopped", method, make, *stops)
    expected, found = outcome(tmp_path / "whole", whole), outcome(tmp_path / "stopped", continued)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("keep", ["last", "each"])
@pytest.mark.parametrize("make", [Moving, lambda n: tiny.Network(n).requires_grad_(False)], ids=["moving", "frozen"])
def test_a_longer_run_goes_on_with_them(tmp_path, make, keep):
    def half_frozen(n):
        model = make(n)
        model.fc1.requires_grad_()
        model.fc2.requires_grad_()
        return model

    run(tmp_path / "grown", Plain, lambda: half_frozen(1), n_tasks=1, keep=keep)
    grown = run(tmp_path / "grown", Plain, lambda: half_frozen(2), n_tasks=2, keep=keep)
    whole = run(tmp_path / "whole", Plain, lambda: half_frozen(2), n_tasks=2, keep=keep)
    torch.testing.assert_close(grown.weights(), whole.weights(), atol=0, rtol=0)
    assert [p.requires_grad for p in grown.model.parameters()] == [p.requires_grad for p in whole.model.parameters()]


def test_a_longer_run_goes_on_from_one_that_did_not_record_what_is_frozen(tmp_path):
    def frozen(n):
        model = tiny.Network(n)
        model.fc2.requires_grad_(False)
        return model

    run(tmp_path, Plain, lambda: frozen(1), n_tasks=1)
    folder = tiny.run_folder(tmp_path)
    state = load_checkpoint(folder)
    del state["frozen"], state["network"]["frozen"]
    save_checkpoint(folder, state)
    grown = run(tmp_path, Plain, lambda: frozen(2), n_tasks=2)
    assert [name for name, p in grown.model.named_parameters() if not p.requires_grad] == ["fc2.weight", "fc2.bias"]


def test_weights_after_each_task_come_with_their_buffers(tmp_path):
    class WithParameters(Plain):
        """Has one more parameter of its own with every task."""

        state = ("shifts",)

        def __init__(self, model, options):
            super().__init__(model, options)
            self.shifts = []

        def before_task(self, t, task):
            self.shifts = [*self.shifts, nn.Parameter(torch.zeros(1).double())]

    run(tmp_path, WithParameters, Moving, keep="each")
    seen = [len(load_run(tiny.run_folder(tmp_path), Moving(), WithParameters, t).model.fc2[1].seen) for t in range(3)]
    assert seen == [12, 24, 36]


def test_a_finished_run_is_known_by_the_network_as_it_came(tmp_path, capsys):
    made = run(tmp_path, LateFreezing, tiny.Network)
    again = experiment.run(made.options, tiny.benchmark(), made.model, made)  # the network is frozen by now
    assert again["finished"] and "finished already" in capsys.readouterr().out


def test_of_a_run_that_recorded_nothing_of_it_no_freezing_is_compared(tmp_path):
    def frozen():
        model = tiny.Network()
        model.fc2.requires_grad_(False)
        return model

    made = run(tmp_path, Plain, frozen)
    folder = tiny.run_folder(tmp_path)
    state = load_checkpoint(folder)
    del state["frozen"], state["network"]["frozen"]
    save_checkpoint(folder, state)
    torch.testing.assert_close(run(tmp_path, Plain, frozen).weights(), made.weights())


def test_buffers_that_are_not_saved_return_with_the_best_weights():
    method = Plain(Moving(), tiny.options("unused"))
    centred = method.model.fc2[1]
    before, kept = centred.mean, method.weights()
    method.model(torch.ones(5, tiny.N_INPUTS).double(), 0)
    assert before.any() and len(centred.seen) == 1
    method.load_weights(kept)
    assert centred.mean is before and not before.any() and len(centred.seen) == 0
    method.load_weights({name: value for name, value in kept.items() if "buffer" not in name})  # of an older version
