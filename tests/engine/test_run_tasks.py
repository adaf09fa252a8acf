"""Tasks are in memory one at a time, however many there are."""

import gc
import weakref

import pytest
import torch

from engine.run_tasks import RunTasks
from engine.task import Benchmark, HeldOut, LazyTasks, Split, Task
from gradproj.errors import InputError
from methods import METHODS
from tests import tiny
from tests.tiny import run
from tests.tiny_nets import SingleHead

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(autouse=True)
def _quick_collections():
    """What other tests have left in memory is not looked at whenever garbage is collected here."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Counted(LazyTasks):
    """Tasks that know how many of their parts are alive, and which were built."""

    def __init__(self, n_tasks, held_out_alone):
        self.alive, self.built, self.most = weakref.WeakSet(), [], 0
        super().__init__(n_tasks, self.build, self.parts if held_out_alone else None)

    def count(self, parts):
        for split in parts:
            self.alive.add(split.images.untyped_storage())
        gc.collect()
        self.most = max(self.most, len(self.alive))

    def build(self, t):
        self.built.append(t)
        task = tiny.task(t)
        self.count((task.train, task.valid, task.test))
        return task

    def parts(self, t):
        task = tiny.task(t)
        parts = HeldOut(task.valid, task.test)
        self.count(parts)
        return parts


@pytest.mark.parametrize("held_out_alone", [False, True])
@pytest.mark.parametrize("method", ["gpm", "er", "single"])
def test_few_parts_are_alive_at_a_time(tmp_path, monkeypatch, method, held_out_alone):
    monkeypatch.setattr("engine.run_tasks.KEPT_BYTES", 0)
    most = {}
    for n_tasks in (3, 8):
        tasks = Counted(n_tasks, held_out_alone)
        options = tiny.options(tmp_path / str(n_tasks), method=method, n_tasks=n_tasks, n_epochs=1, threshold_step=0.0)
        run(options, Benchmark("tiny", "embedded", tasks), tiny.Network(n_tasks))
        most[n_tasks] = tasks.most
        if held_out_alone:
            assert tasks.built == list(range(n_tasks))
    assert most[8] <= most[3] <= 8


def test_what_is_kept_is_bounded(tmp_path, monkeypatch):
    size = sum(tensor.numel() * 8 for part in tiny.task(0).held_out for tensor in part)
    monkeypatch.setattr("engine.run_tasks.KEPT_BYTES", 2 * size)
    options = tiny.options(tmp_path, n_tasks=5, method="naive")
    tasks = RunTasks(Benchmark("tiny", "embedded", Counted(5, True)), METHODS["naive"](SingleHead(), options), "cpu")
    for t in (0, 1, 2, 3, 4, 0, 1, 2):
        parts = tasks.held_out(t)
        assert torch.equal(parts.test.images, tiny.task(t).test.images)
    assert tasks.held_out(1).test.images is tasks.held_out(1).test.images
    assert tasks.held_out(4).test.images is not tasks.held_out(2).test.images
    assert (
        sum(tensor.untyped_storage().nbytes() for parts in tasks._kept.values() for part in parts for tensor in part)
        <= 2 * size
    )


def test_views_do_not_keep_what_they_are_part_of(tmp_path):
    whole = torch.randn(1000, tiny.N_INPUTS, dtype=torch.float64)

    def build(t):
        labels = torch.arange(10) % 3
        return Task(f"view {t}", 3, *(Split(whole[10 * i : 10 * i + 10], labels) for i in range(3)))

    method = METHODS["naive"](SingleHead(), tiny.options(tmp_path, n_tasks=2, method="naive"))
    tasks = RunTasks(Benchmark("views", "embedded", LazyTasks(2, build)), method, "cpu")
    tasks.held_out(1)
    for part in tasks.held_out(1):  # from what was kept
        assert part.images.untyped_storage().nbytes() == part.images.numel() * 8


def test_the_same_numbers_lazily(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run_tasks.KEPT_BYTES", 0)
    for method in ("gpm", "multitask"):
        whole = run(tiny.options(tmp_path / "list", method=method), tiny.benchmark(), tiny.Network())
        tasks = Benchmark("tiny", "embedded", LazyTasks(3, tiny.task))
        lazy = run(tiny.options(tmp_path / "lazy", method=method), tasks, tiny.Network())
        for name in ("accuracy", "valid_accuracy", "class_incremental", "interference", "tasks"):
            assert lazy[name] == whole[name], name


def test_a_single_image_in_a_later_task_is_refused_before_the_first_one_trains(tmp_path):
    """Where BatchNorm cannot take it, and the tasks tell their sizes without being built."""
    built = []
    sizes = [{"train": 30, "valid": 9, "test": 40}, {"train": 30, "valid": 1, "test": 40}]
    tasks = LazyTasks(2, lambda t: built.append(t) or tiny.task(t), sizes=sizes)
    with pytest.raises(InputError, match="^task 2 has 1 validation image; it must be 2 or more .a larger pc_valid"):
        run(tiny.options(tmp_path, n_tasks=2), Benchmark("tiny", "embedded", tasks), tiny.Network(2))
    assert built == [0] and not list(tmp_path.rglob("*.json"))
    run(tiny.options(tmp_path, n_tasks=1), Benchmark("tiny", "embedded", tasks), tiny.Network(2))
