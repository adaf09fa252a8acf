"""A folder's run is taken up again only with the tasks and the network that it had."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from engine.folder import NEWEST
from engine.task import Benchmark, LazyTasks, Split
from gradproj.errors import InputError
from tests import tiny
from tests.tiny import run

pytestmark = pytest.mark.usefixtures("quick")


def other_images(task):
    images = task.train.images.clone()
    images[17, 3] += 1e-3  # one number of one image
    return replace(task, train=Split(images, task.train.labels))


def other_labels(task):
    return replace(task, test=Split(task.test.images, task.test.labels.flip(0)))


def fewer(task):
    return replace(task, train=Split(task.train.images[:-1], task.train.labels[:-1]))


def renamed(task):
    return replace(task, classes=["c", "b", "a"])


class Other(tiny.Network):
    pass


def wider():
    model = tiny.Network()
    model.fc2 = nn.Linear(16, 8, bias=False).double()
    return model


def other_activation():
    model = tiny.Network()
    model.drop = nn.Dropout(0.5)
    return model


def frozen():
    model = tiny.Network()
    model.fc2.requires_grad_(False)
    return model


TASKS = {
    other_images: "training images",
    other_labels: "test labels",
    fewer: "training shape 30x12 there, 29x12 here",
    renamed: "classes 0, 1, 2 there, c, b, a here",
}
NETWORKS = {
    Other: "class tests.tiny.Network there, tests.engine.test_same.Other here",
    wider: "fc2.bias 8 float64 there, not here",
    frozen: "fc2.weight trained there, frozen here",
    other_activation: r"drop Dropout\(p=0.2.* there, Dropout\(p=0.5.* here",
}


def changed(change, t=1):
    benchmark = tiny.benchmark()
    benchmark.tasks[t] = change(benchmark.tasks[t])
    return benchmark


def stop_after_two_tasks(folder):
    """A run of three tasks, of which the last is not to be had."""
    tasks = LazyTasks(3, lambda t: tiny.task(t) if t < 2 else None)
    with pytest.raises(InputError, match="task 3 is a NoneType"):
        run(tiny.options(folder), replace(tiny.benchmark(), tasks=tasks), tiny.Network())


@pytest.fixture(params=["finished", "without its checkpoint", "without checkpoint and config", "stopped"])
def folder(request, tmp_path):
    if request.param == "stopped":
        stop_after_two_tasks(tmp_path)
        return tmp_path
    run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network())
    if "without" in request.param:
        (tiny.run_folder(tmp_path) / NEWEST).unlink()
    if "config" in request.param:
        (tiny.run_folder(tmp_path) / "config.json").unlink()
    return tmp_path


def refused(folder, benchmark, model, message):
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message) as caught:
        run(tiny.options(folder), benchmark, model)
    assert "\n" not in str(caught.value)
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert run(tiny.options(folder, no_resume=True), benchmark, model)["finished"]


@pytest.mark.parametrize("change", TASKS)
def test_other_tasks(folder, change):
    message = rf"holds a run on other tasks \(task 2, clusters 1: {TASKS[change]}\); give those back, choose another"
    refused(folder, changed(change), tiny.Network(), message)


@pytest.mark.parametrize("make", NETWORKS)
def test_another_network(folder, make):
    has_config = list(folder.rglob("config.json"))
    refused(folder, tiny.benchmark(), make(), f"holds a run of another network.*{NETWORKS[make] if has_config else ''}")


def test_the_same_in_another_layout_on_another_day(folder, capsys):
    """Lazily made, and as views with other strides: the same values are the same tasks."""

    def build(t):
        task = tiny.task(t)
        return replace(task, train=Split(task.train.images.T.contiguous().T, task.train.labels))

    assert run(tiny.options(folder), replace(tiny.benchmark(), tasks=LazyTasks(3, build)), tiny.Network())["finished"]


def test_a_function_in_a_layer_is_the_same_in_every_process(tmp_path):
    """Where its address is in the layer's description."""

    class Apply(nn.Module):
        def __init__(self):
            super().__init__()
            self.function = lambda x: x

        def extra_repr(self):
            return repr(self.function)

        def forward(self, x):
            return self.function(x)

    def network():
        model = tiny.Network()
        model.drop = Apply()
        return model

    first = run(tiny.options(tmp_path), tiny.benchmark(), network())
    kept = network()  # at another address
    assert run(tiny.options(tmp_path), tiny.benchmark(), kept)["accuracy"] == first["accuracy"]


def test_tasks_that_are_others_each_time_they_are_built(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run_tasks.KEPT_BYTES", 0)
    random = torch.Generator().manual_seed(0)

    def build(t):
        task = tiny.task(t)
        order = torch.randperm(40, generator=random)
        return replace(task, test=Split(*(part[order] for part in task.test)))

    message = (
        r"task 1 \(clusters 0\) is another one each time it is built \(test images\); what builds it must depend on"
    )
    with pytest.raises(InputError, match=message):
        run(tiny.options(tmp_path), Benchmark("tiny", "embedded", LazyTasks(3, build)), tiny.Network())


def test_a_network_that_begins_otherwise_goes_on_as_it_was(tmp_path, capsys):
    stop_after_two_tasks(tmp_path)
    whole = run(tiny.options(tmp_path / "whole"), tiny.benchmark(), tiny.Network())
    (folder,) = {path.parent for path in tmp_path.rglob(NEWEST)} - {
        path.parent for path in (tmp_path / "whole").rglob(NEWEST)
    }
    options = tiny.options(tmp_path, run_folder=str(folder), quiet=False)
    assert run(options, tiny.benchmark(), tiny.Network(seed=5))["accuracy"] == whole["accuracy"]
    assert "note: the network given begins with other weights than this run's" in capsys.readouterr().out
