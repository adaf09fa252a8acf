"""Which methods and networks take steps written by hand, and which only look as if they might."""

from dataclasses import replace

import pytest
import torch

from engine.method import Method
from engine.steps import make_steps
from engine.task import Split
from methods.naive import Naive
from tests import tiny
from tests.tiny_nets import SingleHead

pytestmark = pytest.mark.usefixtures("quick")


class Summed(Naive):
    name = "summed"

    def loss(self, images, labels, t):
        return super().loss(images, labels, t) + sum(p.square().sum() for p in self.model.parameters())


class Declared(Summed):
    plain_step = True  # not true of it, but said


class InOne(Method):
    name, plain_step = "in_one", True

    def after_step(self, t):
        pass


@pytest.mark.parametrize(
    ("method", "step"),
    [(Naive, "FusedSteps"), (Summed, "EagerSteps"), (Declared, "EagerSteps"), (InOne, "EagerSteps")],
)
def test_a_class_that_changes_the_step_has_no_plain_one(method, step, monkeypatch):
    """Also where the class that it inherits from says that its own is plain, and where it says so itself."""
    monkeypatch.setattr(SingleHead, "relu_chain", property(lambda self: [self.fc1, self.fc2]), raising=False)
    learner = method(SingleHead().float(), tiny.options("unused"))
    task = tiny.task(0, dtype=torch.float32)
    assert type(make_steps(learner, learner.optimizer(0, 0.1), 0, task)).__name__ == step


class Bounded(SingleHead):
    """Like a chain of Linear and ReLU as long as no value is above 2."""

    def forward(self, images, task):
        return self.fc2(self.fc1(images).clamp(0, 2))


def with_hook(hook):
    def make():
        model = SingleHead()
        hook(model)
        return model

    return make


@pytest.mark.parametrize(
    "make",
    [
        Bounded,
        with_hook(lambda model: model.fc1.weight.register_hook(lambda g: g / 2)),
        with_hook(lambda model: model.fc1.weight.register_post_accumulate_grad_hook(lambda p: None)),
        with_hook(lambda model: model.fc2.register_full_backward_hook(lambda *_: None)),
    ],
)
def test_a_network_that_only_looks_like_a_chain_takes_eager_steps(make, monkeypatch):
    monkeypatch.setattr(SingleHead, "relu_chain", property(lambda self: [self.fc1, self.fc2]), raising=False)
    learner = Naive(make().float(), tiny.options("unused"))
    task = tiny.task(0, dtype=torch.float32)
    small = replace(task, train=Split(task.train.images / 100, task.train.labels))
    steps = make_steps(learner, learner.optimizer(0, 0.1), 0, small)
    assert type(steps).__name__ == "EagerSteps"
