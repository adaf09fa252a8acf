"""A continued run has all that moves outside a network's own state: unsaved buffers, frozen parameters."""

import pytest
import torch
from torch import nn

from engine import experiment
from engine.interrupts import Stopped
from engine.method import Method
from methods.naive import Naive
from tests import tiny

pytestmark = pytest.mark.usefixtures("quick")


class Centred(nn.Module):
    """Subtracts a moving mean of what it sees; remembers how often it was called."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(8).double(), persistent=False)
        self.register_buffer("seen", torch.zeros(0).double(), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.seen = torch.cat([self.seen, x.detach().mean()[None]])
        return x - self.mean - self.seen.sum()


class Moving(tiny.Network):
    def __init__(self):
        super().__init__()
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


def outcome(folder, method, make, stops_at):
    """The accuracies of a run and its weights, after a stop on the way if there is to be one."""
    if stops_at:
        made = method(make(), tiny.options(folder))
        made.stops_at = stops_at
        with pytest.raises(Stopped):
            experiment.run(made.options, tiny.benchmark(), made.model, made)
    made = method(make(), tiny.options(folder))
    return experiment.run(made.options, tiny.benchmark(), made.model, made)["accuracy"], made.weights()


@pytest.mark.parametrize("make, method", [(Moving, Plain), (tiny.Network, Freezing), (tiny.Network, LateFreezing)])
@pytest.mark.parametrize("stops_at", ["step 18", "the beginning of task 2"])
def test_the_same_numbers_as_without_a_stop(tmp_path, make, method, stops_at):
    whole = outcome(tmp_path / "whole", method, make, "")
    continued = outcome(tmp_path / "stopped", method, make, stops_at)
    torch.testing.assert_close(continued, whole, atol=0, rtol=0)


def test_buffers_that_are_not_saved_return_with_the_best_weights():
    method = Plain(Moving(), tiny.options("unused"))
    centred = method.model.fc2[1]
    before, kept = centred.mean, method.weights()
    method.model(torch.ones(5, tiny.N_INPUTS).double(), 0)
    assert before.any() and len(centred.seen) == 1
    method.load_weights(kept)
    assert centred.mean is before and not before.any() and len(centred.seen) == 0
    method.load_weights({name: value for name, value in kept.items() if "buffer" not in name})  # of an older version
