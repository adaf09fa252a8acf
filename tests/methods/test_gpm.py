"""GPM and plain training against their equations; what GPM feeds its memory: ε, layers, and which images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.seeds import generator
from methods import gpm as gpm_module
from tests import tiny
from tests.methods.cases import MethodCase, Slow, SlowGPM
from tests.tiny_nets import method


class TestNaive(MethodCase):
    name, slow = "naive", Slow


class TestGPM(MethodCase):
    name, slow = "gpm", SlowGPM


@pytest.fixture
def recorded():
    """Three tasks through a GPM whose memory writes down what it is given instead of remembering it."""

    def record(n_train: int = 30, **changes: Any) -> list[dict[str, Any]]:
        gpm, calls = method(tiny.Network(), "gpm", **changes), []

        def update(forward, batches, threshold, samples=None):
            calls.append({"batches": list(batches), "threshold": threshold, "samples": samples, "forward": forward})

        gpm.memory.update = update
        for t in range(3):
            gpm.after_task(t, tiny.task(t, n_train))
        return calls

    return record


def places(images: Tensor, t: int, n_train: int = 30) -> list[int]:
    """Where some images stand in the training set of a task; fails for an image that is not there."""
    found = (images[:, None] == tiny.task(t, n_train).train.images).all(2)
    assert found.any(1).all(), "an image is not of the task's training set"
    return found.long().argmax(1).tolist()


def test_epsilon_is_that_of_the_first_task_and_rises_by_a_step_with_each_later_one(recorded):
    calls = recorded(threshold=(0.9, 0.95), threshold_step=0.02)
    assert [call["threshold"] for call in calls] == [
        pytest.approx({"fc1": 0.9 + 0.02 * t, "fc2": 0.95 + 0.02 * t}) for t in range(3)
    ]
    assert recorded(threshold=(0.9,), threshold_step=0.05)[2]["threshold"] == {"fc1": 1.0, "fc2": 1.0}


def test_images_are_random_ones_of_the_tasks_training_set_others_for_each_task(recorded):
    chosen = [places(call["batches"][0], t) for t, call in enumerate(recorded(n_samples=10))]
    for found in chosen:
        assert len(found) == len(set(found)) == 10
        assert found != list(range(10))
    assert len({tuple(found) for found in chosen}) == 3
    assert [places(call["batches"][0], t) for t, call in enumerate(recorded(n_samples=10))] == chosen
    assert [places(call["batches"][0], t) for t, call in enumerate(recorded(n_samples=10, seed=2))] != chosen


def test_the_choice_is_the_same_whatever_trained_the_network(recorded):
    order = torch.randperm(30, generator=generator(1, "samples", 2))[:10].tolist()
    assert places(recorded(n_samples=10)[2]["batches"][0], 2) == order


def test_layers_use_as_many_images_as_samples_says(recorded):
    assert [call["samples"] for call in recorded(samples={"fc1": 4})] == [{"fc1": 4}] * 3
    assert recorded()[0]["samples"] == {}
    assert recorded(samples={"fc1": 4, "fc2": 7})[1]["samples"] == {"fc1": 4, "fc2": 7}


def test_all_images_come_in_batches_of_the_usual_size(recorded):
    for t, call in enumerate(recorded(n_train=300, n_samples="all", samples={})):
        assert [len(batch) for batch in call["batches"]] == [125, 125, 50]
        assert sorted(places(torch.cat(call["batches"]), t, 300)) == list(range(300))
        assert call["samples"] == {}


def test_all_images_may_be_gone_through_twice():
    """As where the matrices of all layers do not fit into memory at once."""
    images, _ = method(tiny.Network(), "gpm", n_samples="all", samples={}).representative(0, tiny.task(0, 300).train)
    assert torch.equal(torch.cat(list(images)), torch.cat(list(images)))


def test_all_images_where_that_is_the_scripts_own_default(monkeypatch):
    monkeypatch.setattr(gpm_module, "defaults", lambda *_: {"n_samples": "all"})
    learner = method(tiny.Network(), "gpm", n_samples="all", samples={}, batch_size_test=30)
    images, _ = learner.representative(0, tiny.task(0, 60).train)
    assert [len(batch) for batch in images] == [30, 30]


def test_the_network_is_run_for_the_task_at_hand(recorded):
    seen = []
    calls = recorded()
    for t, call in enumerate(calls):
        model = call["forward"].__closure__[0].cell_contents.model
        handle = model.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
        call["forward"](call["batches"][0])
        handle.remove()
        assert seen.pop() == t
