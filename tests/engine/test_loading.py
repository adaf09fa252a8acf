"""Reading a run back: after an earlier task, with a method of one's own, as it was tested, and from older versions."""

import json
from pathlib import Path

import pytest
import torch

from engine import experiment, load_run
from engine.evaluation import evaluate
from engine.folder import NEWEST, TASK_WEIGHTS
from engine.options import flag
from gradproj.errors import InputError
from gradproj.files import load_tensors, save_tensors
from methods import METHODS
from methods.gpm import GPM
from tests import tiny
from tests.tiny import run
from tests.tiny_nets import SingleHead

pytestmark = pytest.mark.usefixtures("quick")
ONE_HEAD = [name for name, method in METHODS.items() if method.heads == "one"]


def network(method):
    return SingleHead() if method in ONE_HEAD else tiny.Network()


def accuracies(loaded, n_tasks=3):
    found = []
    for j in range(n_tasks):
        with loaded.network(j) as model:
            found.append(evaluate(model, j, tiny.task(j).test, 64)[1])
    return found


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.joint])
def test_the_network_after_each_task(tmp_path, method):
    summary = run(tiny.options(tmp_path, method=method, keep="each"), tiny.benchmark(), network(method))
    for k in range(3):
        loaded = load_run(summary["folder"], network(method), after_task=k)
        assert accuracies(loaded, k + 1) == summary["accuracy"][k][: k + 1]
    assert accuracies(load_run(summary["folder"], network(method))) == summary["accuracy"][-1]


def test_with_task_statistics(tmp_path):
    options = tiny.options(tmp_path, keep="each", batchnorm="task")
    summary = run(options, tiny.benchmark(), tiny.Network())
    assert accuracies(load_run(summary["folder"], tiny.Network(), after_task=1), 2) == summary["accuracy"][1][:2]
    with load_run(summary["folder"], tiny.Network()).network(1) as model:
        images = tiny.task(1).test.images
        torch.testing.assert_close(model(images[:1], 1), model(images, 1)[:1])  # one image by itself


@pytest.mark.parametrize("k", [0, -1, 3, 7])
def test_weights_that_were_not_kept(tmp_path, k):
    folder = run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network())["folder"]
    message = rf"has no weights after task {k}, counted from 0: the run has learned 3 tasks, and only --keep each keeps"
    with pytest.raises(InputError, match=message):
        load_run(folder, tiny.Network(), after_task=k)
    assert load_run(folder, tiny.Network(), after_task=2).summary["finished"]


@pytest.mark.parametrize("keep", ["last", "each"])
def test_what_stays_on_the_disk(tmp_path, keep):
    """Model, memory and the method's state once; with --keep each, weights alone for the other tasks."""
    summary = run(tiny.options(tmp_path, keep=keep), tiny.benchmark(), tiny.Network())
    files = {path.name for path in Path(summary["folder"]).glob("*.pt")}
    assert files == {NEWEST, *([TASK_WEIGHTS.format(0), TASK_WEIGHTS.format(1)] if keep == "each" else [])}
    state = load_tensors(tiny.run_folder(tmp_path) / NEWEST)
    assert state["task_progress"] is None
    assert state["first"] == {}
    if keep == "each":
        assert load_tensors(tiny.run_folder(tmp_path) / TASK_WEIGHTS.format(0)).keys() == state["model"].keys()


class Own(GPM):
    """With a flag of its own."""

    name = "own"
    flags = {"strength": flag(0.5, "of what it does")}


def test_a_method_of_ones_own(tmp_path):
    from engine.options import with_flags

    values = vars(tiny.options(tmp_path, threshold=(0.8,)))
    options = with_flags(type(tiny.options(tmp_path)).script, Own)(**values | {"method": "own", "strength": 0.25})
    model = tiny.Network()
    summary = experiment.run(options, tiny.benchmark(), model, Own(model, options))
    loaded = load_run(summary["folder"], tiny.Network())  # found by its module and name
    assert type(loaded.method) is Own
    assert loaded.method.options.strength == 0.25
    assert accuracies(loaded) == summary["accuracy"][-1]
    config = tiny.run_folder(tmp_path) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"method": "__main__.Own"}))
    with pytest.raises(InputError, match="cannot find the class of the run's method .*; give load_run the class"):
        load_run(summary["folder"], tiny.Network())
    assert accuracies(load_run(summary["folder"], tiny.Network(), method=Own)) == summary["accuracy"][-1]


SINCE = ("tasks", "network", "initial", "interference", "threads")


@pytest.mark.parametrize("n_learned", [3, 2])
def test_a_run_of_an_older_version(tmp_path, n_learned):
    """It recorded neither tasks nor network nor class-incremental accuracy, and goes on all the same."""
    expected = run(tiny.options(tmp_path / "new", keep="each"), tiny.benchmark(), tiny.Network())
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        learn = experiment.Run.learn

        def stopping(self, t):
            learn(self, t)
            if t == n_learned - 1:
                raise KeyboardInterrupt

        patch.setattr(experiment.Run, "learn", stopping)
        run(tiny.options(tmp_path / "old"), tiny.benchmark(), tiny.Network())
    path = tiny.run_folder(tmp_path / "old") / NEWEST
    state = {name: value for name, value in load_tensors(path).items() if name not in SINCE}
    del state["accuracy"]["class_incremental"]

    save_tensors(path, state)
    found = run(tiny.options(tmp_path / "old"), tiny.benchmark(), tiny.Network())
    for name in ("accuracy", "valid_accuracy", "memory_columns", "epochs", "interference", "tasks"):
        assert found[name] == expected[name], name
    assert (found["class_incremental"] is None) == (n_learned == 3)
    assert accuracies(load_run(found["folder"], tiny.Network())) == found["accuracy"][-1]
