"""Tasks that do not fit themselves, the network or the method: one line before anything trains, and no folder."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engine.task import Benchmark, LazyTasks, Split
from gradproj.errors import InputError
from methods import METHODS
from tests import tiny
from tests.tiny import run

pytestmark = pytest.mark.usefixtures("quick")


def spoilt(part="train", images=lambda x: x, labels=lambda y: y):
    """A change of one part of a task."""

    def change(task):
        split = getattr(task, part)
        return replace(task, **{part: Split(images(split.images), labels(split.labels))})

    return change


def with_value(value):
    def changed(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return changed


BAD = {
    "a label too high": (
        spoilt(labels=with_value(3)),
        "clusters 1: training labels go from 0 to 3; they must be 0 to 2",
    ),
    "a negative label": (spoilt("test", labels=with_value(-1)), "test labels go from -1 to 2; they must be 0 to 2"),
    "int32 labels": (spoilt(labels=torch.Tensor.int), r"training labels are int32 \(30,\); they must be int64 \(n,\)"),
    "float labels": (spoilt("valid", labels=torch.Tensor.float), r"validation labels are float32 \(9,\); .*\.long\(\)"),
    "one-hot labels": (
        spoilt(labels=lambda y: F.one_hot(y, 3)),
        r"labels are int64 \(30, 3\); they must be int64 \(n,\)",
    ),
    "fewer labels": (spoilt(labels=lambda y: y[:-1]), r"images are float64 \(30, 12\) and labels int64 \(29,\); there"),
    "float32": (
        spoilt(images=torch.Tensor.float),
        "Network cannot take clusters 1 .*weights are float64: give images.to",
    ),
    "uint8": (spoilt(images=torch.Tensor.byte), "Network cannot take clusters 1 .*give floats, normalised: such as"),
    "float32 at test": (
        spoilt("test", images=torch.Tensor.float),
        "cannot take clusters 1 .*weights are float64: give",
    ),
    "NumPy": (spoilt(images=torch.Tensor.numpy), "training images are a ndarray; give a tensor"),
    "NumPy labels": (spoilt(labels=np.asarray), "training labels are a ndarray; give a tensor"),
    "NaN": (spoilt(images=with_value(np.nan)), "clusters 1: training images hold NaN or infinite values"),
    "infinite at test": (spoilt("test", images=with_value(np.inf)), "test images hold NaN or infinite values"),
    "no test": (spoilt("test", lambda x: x[:0], lambda y: y[:0]), "clusters 1 has no test images; it must have some"),
    "no training": (spoilt("train", lambda x: x[:0], lambda y: y[:0]), "clusters 1 has no training images"),
    "no validation": (
        spoilt("valid", lambda x: x[:0], lambda y: y[:0]),
        "schedule is plateau, but clusters 1 has no val",
    ),
    "another width": (spoilt(images=lambda x: x[:, :7]), "Network cannot take clusters 1 .*images float64"),
    "a test of another width": (spoilt("test", images=lambda x: x[:, :7]), "Network cannot take clusters 1 .*float64"),
    "more classes": (lambda task: replace(task, n_classes=4), "Network has 3 outputs for the 4 classes of clusters 1"),
    "no number of classes": (lambda task: replace(task, n_classes=3.0), "n_classes is 3.0; it must be the number of"),
    "too few names": (lambda task: replace(task, classes=["a"]), "classes are .*; they must be 3 names or numbers"),
    "no names": (
        lambda task: replace(task, classes=[0.5, None, "a"]),
        "classes are .*; they must be 3 names or numbers",
    ),
    "a pair": (lambda task: replace(task, train=tuple(task.train)), "training images are a tuple; give an .*Split"),
    "no task": (lambda task: task.train, "task 2 is a Split; it must be an engine.task.Task"),
}


def test_a_class_that_is_tested_without_being_taught_is_named(tmp_path):
    benchmark = tiny.benchmark()
    task = benchmark.tasks[1]
    taught = task.train.labels != 2
    some = Split(task.train.images[taught], task.train.labels[taught])
    benchmark.tasks[1] = replace(task, train=some, classes=["a", "b", "c"])
    with pytest.warns(UserWarning, match="^clusters 1 is tested on class c without a training image of it$"):
        run(tiny.options(tmp_path), benchmark, tiny.Network())


@pytest.mark.parametrize("lazy", [False, True], ids=["list", "lazy"])
@pytest.mark.parametrize("what", BAD)
def test_a_bad_task(tmp_path, what, lazy):
    change, message = BAD[what]
    tasks = tiny.benchmark().tasks
    tasks[1] = change(tasks[1])
    if lazy:
        tasks = LazyTasks(3, tasks.__getitem__)
    model = tiny.Network()
    with pytest.raises(InputError, match=message) as caught:
        run(tiny.options(tmp_path), Benchmark("tiny", "embedded", tasks), model)
    assert "\n" not in str(caught.value)
    if lazy:  # the first task is learned by then, and not lost
        assert list(tmp_path.rglob("checkpoint.pt"))
        assert not list(tmp_path.rglob("summary.json"))
    else:
        assert model.n_training_batches == 0
        assert not list(tmp_path.iterdir())


def test_a_bad_first_task_of_lazy_ones_leaves_nothing(tmp_path):
    change, message = BAD["a label too high"]
    tasks = LazyTasks(3, lambda t: change(tiny.task(t + 1)))
    with pytest.raises(InputError, match=message):
        run(tiny.options(tmp_path), Benchmark("tiny", "embedded", tasks), tiny.Network())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (lambda: tiny.benchmark(2).tasks, "n_tasks is 3, but tiny has 2 tasks; give n_tasks 2 or less"),
        (list, "n_tasks is 3, but tiny has no tasks$"),
        (lambda: iter(tiny.benchmark().tasks), "the tasks of tiny are a list_iterator; give a list of Task, or Lazy"),
    ],
)
def test_bad_tasks(tmp_path, tasks, message):
    with pytest.raises(InputError, match=message):
        run(tiny.options(tmp_path), Benchmark("tiny", "embedded", tasks()), tiny.Network())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/b", "a\\b", "..", "", " ", "a\nb", "C:", None])
def test_a_name_that_leads_out_of_the_output_folder(tmp_path, name):
    for benchmark in (Benchmark(name, "embedded", []), Benchmark("tiny", name, [])):
        with pytest.raises(InputError, match="it names a folder, so it must have letters and none of"):
            run(tiny.options(tmp_path / "runs"), benchmark, tiny.Network())
    assert not list(tmp_path.iterdir())


class Pooled(nn.Module):
    """Takes images of any size, with a head for each task."""

    def __init__(self, sizes=(3, 3, 3)):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 8)
        self.heads = nn.ModuleList(nn.Linear(8, n) for n in sizes)

    def forward(self, images, task):
        return self.heads[task](F.relu(self.fc(F.relu(self.conv(images)).mean((2, 3)))))


def sized_task(t, size, n_classes=3, channels=2):
    random = torch.Generator().manual_seed(t)

    def split(n):
        labels = torch.arange(n) % n_classes
        return Split(torch.randn(n, channels, size, size, generator=random) + labels[:, None, None, None], labels)

    return replace(
        tiny.task(t), name=f"size {size}", n_classes=n_classes, train=split(24), valid=split(9), test=split(15)
    )


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.heads != "one"])
def test_images_and_classes_that_differ_between_tasks(tmp_path, method):
    """Every method works, or says before anything trains that it cannot."""
    tasks = [sized_task(0, 5), sized_task(1, 7, n_classes=2), sized_task(2, 6, n_classes=4)]
    options, model = tiny.options(tmp_path, method=method), Pooled((3, 2, 4))
    benchmark = Benchmark("sizes", "embedded", tasks)
    if METHODS[method].mixes_tasks or METHODS[method].joint:
        with pytest.raises(
            InputError, match=f"{method} puts images of several tasks into one batch, so they must have"
        ):
            run(options, benchmark, model)
        assert not list(tmp_path.iterdir())
    else:
        summary = run(options, benchmark, model)
        assert summary["finished"]
        assert [len(task["classes"]) for task in summary["tasks"]] == [3, 2, 4]


@pytest.mark.parametrize("method", ["gpm", "er", "multitask"])
def test_classes_that_differ_between_tasks(tmp_path, method):
    tasks = [sized_task(0, 5), sized_task(1, 5, n_classes=2), sized_task(2, 5, n_classes=4)]
    summary = run(tiny.options(tmp_path, method=method), Benchmark("n", "embedded", tasks), Pooled((3, 2, 4)))
    assert all(x is None or 0 <= x <= 100 for row in summary["class_incremental"] for x in row)


def test_channels_that_the_network_cannot_take(tmp_path):
    tasks = [sized_task(0, 5), sized_task(1, 5, channels=3), sized_task(2, 5)]
    with pytest.raises(InputError, match=r"Pooled cannot take size 5 \(task 2, images float32 \(24, 3, 5, 5\)\)"):
        run(tiny.options(tmp_path), Benchmark("channels", "embedded", tasks), Pooled())


def test_a_network_that_returns_no_logits(tmp_path):
    class Pair(tiny.Network):
        def forward(self, images, task):
            return super().forward(images, task), images

    with pytest.raises(InputError, match=r"Pair returns a tuple for 2 images of clusters 0; it must be their logits"):
        run(tiny.options(tmp_path), tiny.benchmark(), Pair())


def test_classes_of_another_kind_are_named(tmp_path):
    tasks = [replace(task, classes=["a", "b", "c"]) for task in tiny.benchmark().tasks]
    summary = run(tiny.options(tmp_path), Benchmark("tiny", "embedded", tasks), tiny.Network())
    assert [task["name"] for task in summary["tasks"]] == ["clusters 0", "clusters 1", "clusters 2"]
    assert [task["classes"] for task in summary["tasks"]] == [["a", "b", "c"]] * 3
