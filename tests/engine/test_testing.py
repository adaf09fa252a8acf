"""Accuracy without the task's identity: the fast way against the obvious one."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from engine import load_run, testing
from gradproj.normalization import training_statistics
from methods import METHODS
from tests import tiny
from tests.tiny import run
from tests.tiny_nets import Residual, SingleHead, picture_task, pictures

pytestmark = pytest.mark.usefixtures("quick")
MANY = [name for name, method in METHODS.items() if method.heads != "one"]


@torch.no_grad()
def among_all(loaded, benchmark, batch_size):
    """The last row, image by image: the largest of all outputs must be the right one of the right head."""
    row = []
    for j, task in enumerate(benchmark.tasks):
        outputs = []
        for i in range(len(benchmark.tasks)):
            with loaded.network(i) as model:
                outputs.append(torch.cat([model(part, i) for part in task.test.images.split(batch_size)]))
        right = 0
        for n, label in enumerate(task.test.labels.tolist()):
            best = max((value.item(), i, c) for i, part in enumerate(outputs) for c, value in enumerate(part[n]))
            right += best[1:] == (j, label)
        row.append(100 * right / len(task.test.labels))
    return row


@pytest.mark.parametrize("method", MANY)
@pytest.mark.parametrize("network", ["linear", "convolutional"])
def test_class_incremental_accuracy(tmp_path, method, network):
    make, benchmark = (tiny.Network, tiny.benchmark()) if network == "linear" else (Residual, pictures())
    options = tiny.options(tmp_path, method=method, batch_size_test=10)
    summary = run(options, benchmark, make())
    loaded = load_run(summary["folder"], make())
    found = summary["class_incremental"]
    assert found[-1] == pytest.approx(among_all(loaded, benchmark, 10))
    assert all(
        a is None or a <= b for rows in zip(found, summary["accuracy"], strict=True) for a, b in zip(*rows, strict=True)
    )
    if not METHODS[method].joint:
        assert [[value is None for value in row] for row in found] == [[j > i for j in range(3)] for i in range(3)]
        assert found[0][0] == summary["accuracy"][0][0]


def test_with_task_statistics(tmp_path):
    options = tiny.options(tmp_path, batchnorm="task")
    summary = run(options, tiny.benchmark(), tiny.Network())
    loaded = load_run(summary["folder"], tiny.Network())
    assert summary["class_incremental"][-1] == pytest.approx(among_all(loaded, tiny.benchmark(), 64))


def test_task_statistics_are_of_the_network_as_it_is_tested(tmp_path):
    options = tiny.options(tmp_path, method="trgp", region_threshold=0.0, batchnorm="task")
    summary = run(options, pictures(), Residual())
    loaded = load_run(summary["folder"], Residual())
    images = picture_task(2).train.images

    def statistics():
        return training_statistics(loaded.model, lambda batch: loaded.model(batch, 2), [images])

    with loaded.method.testing(2):
        assert_close(loaded.statistics[2], statistics())
    with pytest.raises(AssertionError, match="close"):
        assert_close(loaded.statistics[2], statistics())


def test_one_head_for_all_has_none(tmp_path):
    assert run(tiny.options(tmp_path), tiny.benchmark(), SingleHead())["class_incremental"] is None


class Gated(tiny.Network):
    """Tasks differ by more than their heads: features of later tasks are reversed."""

    def forward(self, images, task):
        return super().forward(images if task == 0 else -images, task)


class Strange(tiny.Network):
    """The last layer is not the head itself: something comes after it."""

    def forward(self, images, task):
        return super().forward(images, task) * torch.tensor([1.0, -1.0, 2.0][task])


class HeadTwice(tiny.Network):
    def forward(self, images, task):
        self.heads[task](torch.zeros(1, 8, dtype=torch.float64))
        return super().forward(images, task)


@pytest.mark.parametrize("make", [tiny.Network, Gated, Strange, HeadTwice])
def test_the_fast_way_is_taken_only_where_it_gives_the_same(tmp_path, monkeypatch, make):
    fast = run(tiny.options(tmp_path / "fast"), tiny.benchmark(), make())
    used = []
    monkeypatch.setattr(testing.Tester, "logits_by_head", lambda self, *_: used.append(1))
    if make is tiny.Network:
        with pytest.raises(TypeError):  # it is taken
            run(tiny.options(tmp_path / "used"), tiny.benchmark(), make())
        assert used
    monkeypatch.setattr(testing.Tester, "heads_alone", lambda self, n_seen: [])
    slow = run(tiny.options(tmp_path / "slow"), tiny.benchmark(), make())
    assert fast["class_incremental"] == slow["class_incremental"]
    assert fast["accuracy"] == slow["accuracy"]


def test_features_pass_the_body_once_for_all_heads(tmp_path):
    model = tiny.Network()
    calls = []
    model.fc1.register_forward_hook(lambda module, args, _: calls.append((module.training, len(args[0]))))
    run(tiny.options(tmp_path, n_epochs=1, method="naive", schedule="constant"), tiny.benchmark(), model)
    # A pass for each test, not for each head, and one to measure the interference.
    assert sum(not training and n == 40 for training, n in calls) == 1 + 2 + 3 + 1


def test_heads_of_different_inputs(tmp_path):
    class Wide(tiny.Network):
        def __init__(self):
            super().__init__()
            self.heads[1] = nn.Linear(16, 3).double()

        def forward(self, images, task):
            x = self.fc2(self.norm(self.fc1(images)).relu())
            return self.heads[task](torch.cat([x, -x], dim=1) if task == 1 else x)

    summary = run(tiny.options(tmp_path), tiny.benchmark(), Wide())
    assert all(value is not None for value in summary["class_incremental"][-1])
