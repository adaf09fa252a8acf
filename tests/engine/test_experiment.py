"""Whole runs on a tiny benchmark: what they leave behind, and that they can be repeated and continued."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from engine import hardware, training
from engine.metrics import average_accuracy, backward_transfer
from engine.options import Options
from engine.progress import Progress
from engine.standing import Epoch
from gradproj import GradientProjectionMemory
from gradproj.errors import InputError
from gradproj.projection import full_float32
from methods.gpm import GPM
from tests import tiny
from tests.tiny import run

METHODS = pytest.mark.parametrize("method", ["gpm", "naive"])


pytestmark = pytest.mark.usefixtures("quick")


def numbers(summary: dict) -> dict:
    """What two runs of the same experiment have in common, to the last bit."""
    names = ("accuracy", "valid_accuracy", "average_accuracy", "backward_transfer", "memory_columns", "epochs")
    return {name: summary[name] for name in names}


@METHODS
def test_run_folder(tmp_path, method):
    summary = run(tiny.options(tmp_path, method=method), tiny.benchmark(), tiny.Network())
    folder = tiny.run_folder(tmp_path / "embedded" / "tiny" / method)
    assert folder.name == "seed-1"
    found = {path.name for path in folder.iterdir()}
    assert {"config.json", "epochs.jsonl", "accuracy.csv", "summary.json"} <= found
    assert not [name for name in found if name.endswith(".tmp")]

    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert json.loads((folder / "config.json").read_text())["hyperparameters"]["n_epochs"] == 3
    heading, *rows = csv.reader((folder / "accuracy.csv").read_text().splitlines())
    assert heading == ["test accuracy, %", "clusters 0", "clusters 1", "clusters 2"]
    assert [row[0] for row in rows] == ["after clusters 0", "after clusters 1", "after clusters 2"]
    values = [[float(value) if value else None for value in row[1:]] for row in rows]
    assert values == [[None if value is None else round(value, 4) for value in row] for row in summary["accuracy"]]
    assert len(tiny.epochs(tmp_path)) == sum(summary["epochs"])


def test_summary(tmp_path):
    summary = run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network())
    assert summary["finished"] is True
    assert summary["benchmark"] == "tiny"
    assert summary["method"] == "gpm"
    assert summary["seed"] == 1
    assert summary["protocol"] == "paper"
    assert summary["data"]["kind"] == "embedded"
    assert summary["data"]["sources"]["clusters"]["sha256"] == "0" * 64
    assert list(summary["data"]["notes"]) == ["made up"]
    for matrix in (summary["accuracy"], summary["valid_accuracy"]):
        assert [[value is None for value in row] for row in matrix] == [[j > i for j in range(3)] for i in range(3)]
        assert all(0 <= value <= 100 for row in matrix for value in row if value is not None)
    assert summary["average_accuracy"] == average_accuracy(summary["accuracy"])
    assert summary["backward_transfer"] == backward_transfer(summary["accuracy"])
    assert summary["memory_input_sizes"] == {"fc1": tiny.N_INPUTS + 1, "fc2": 17}  # the bias is one more input
    for key, columns in summary["memory_columns"].items():
        assert columns == sorted(columns)
        assert 0 < columns[0] <= columns[-1] <= summary["memory_input_sizes"][key]
    assert summary["seconds"]["total"] > 0
    assert summary["versions"]["torch"] == torch.__version__


def test_accuracy_is_that_of_the_network_left_behind(tmp_path):
    model, benchmark = tiny.Network(), tiny.benchmark()
    summary = run(tiny.options(tmp_path), benchmark, model)
    model.eval()
    for t, measured in enumerate(summary["accuracy"][-1]):
        test = benchmark.tasks[t].test
        with torch.no_grad():  # one batch: BatchNorm uses its statistics
            expected = 100 * (model(test.images, t).argmax(1) == test.labels).double().mean().item()
        assert measured == pytest.approx(expected)


@METHODS
def test_same_seed_same_numbers(tmp_path, method):
    summaries, models = [], []
    for i in range(2):
        models.append(tiny.Network())
        options = tiny.options(tmp_path / str(i), method=method)
        summaries.append(numbers(run(options, tiny.benchmark(), models[-1])))
        torch.rand(17)  # what happens elsewhere in the process does not matter
    assert summaries[0] == summaries[1]
    assert tiny.epochs(tmp_path / "0") == tiny.epochs(tmp_path / "1")
    assert_close(models[0].state_dict(), models[1].state_dict(), atol=0, rtol=0)


def test_another_seed_other_numbers(tmp_path):
    for seed in (1, 2):
        run(tiny.options(tmp_path / str(seed), seed=seed), tiny.benchmark(), tiny.Network())
    assert tiny.epochs(tmp_path / "1")[0] != tiny.epochs(tmp_path / "2")[0]


class Failing(tiny.Network):
    """Fails at the given call in training or in eval mode, if at all; copies are sound."""

    def __init__(self, mode: str = "training", call: int = 0) -> None:
        super().__init__()
        self.fails_in_training, self.left = mode == "training", call

    def __deepcopy__(self, memo):
        other = Failing()
        other.load_state_dict(self.state_dict())
        return other

    def forward(self, images, task):
        if self.training == self.fails_in_training:
            self.left -= 1
            if self.left == 0:
                raise RuntimeError("power cut")
        return super().forward(images, task)


@METHODS
@pytest.mark.parametrize(
    ("mode", "call"),
    # Four batches an epoch, three epochs a task.
    [("training", 1), ("training", 6), ("training", 9), ("training", 13), ("training", 20), ("training", 35)]
    + [("eval", 2), ("eval", 5), ("eval", 12)],
)
def test_continues_after_a_failure_to_the_same_numbers(tmp_path, method, mode, call):
    changes = {"method": method, "momentum": 0.5, "lr_patience": 1, "lr_factor": 3.0}
    whole, continued = Failing(), Failing()
    expected = run(tiny.options(tmp_path / "whole", **changes), tiny.benchmark(), whole)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tiny.options(tmp_path / "cut", **changes), tiny.benchmark(), Failing(mode, call))
    if call > 6:
        assert list((tmp_path / "cut").rglob("checkpoint*"))
    torch.manual_seed(99)
    found = run(tiny.options(tmp_path / "cut", **changes), tiny.benchmark(), continued)
    assert numbers(found) == numbers(expected)
    assert tiny.epochs(tmp_path / "cut") == tiny.epochs(tmp_path / "whole")
    assert_close(continued.state_dict(), whole.state_dict(), atol=0, rtol=0)
    if call > 6:  # and did not begin anew
        assert continued.n_training_batches < whole.n_training_batches


def test_whoever_made_a_run_is_named(tmp_path, monkeypatch):
    at, device = ["a"], ["x, 1 thread(s)"]
    monkeypatch.setattr("engine.hardware.commit", lambda: at[0])
    monkeypatch.setattr("engine.hardware.describe", lambda _: device[0])
    with pytest.raises(RuntimeError, match="power cut"):
        run(tiny.options(tmp_path), tiny.benchmark(), Failing("training", 20))
    at[0], device[0] = "b", "y, 2 thread(s)"
    model = Failing()
    # Somebody commits while the run goes on by the code that it has loaded.
    model.register_forward_hook(lambda *_: at.__setitem__(0, "c"))
    summary = run(tiny.options(tmp_path), tiny.benchmark(), model)
    assert (summary["commit"], summary["device"]) == ("a, b", "x, 1 thread(s); y, 2 thread(s)")


def test_a_damaged_checkpoint_is_passed_over(tmp_path):
    expected = run(tiny.options(tmp_path / "whole"), tiny.benchmark(), tiny.Network())
    with pytest.raises(RuntimeError, match="power cut"):
        run(tiny.options(tmp_path / "cut"), tiny.benchmark(), Failing("training", 20))
    path = tiny.run_folder(tmp_path / "cut") / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.warns(UserWarning, match="checkpoint.pt is damaged.*older"):
        found = run(tiny.options(tmp_path / "cut"), tiny.benchmark(), Failing())
    assert numbers(found) == numbers(expected)


def test_a_finished_run_is_not_run_again(tmp_path, capsys):
    first = run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network())
    capsys.readouterr()
    model = tiny.Network()
    again = run(tiny.options(tmp_path), tiny.benchmark(), model)
    assert again == json.loads(json.dumps(first))
    assert model.n_training_batches == 0
    assert f"ACC {first['average_accuracy']:.2f} %" in capsys.readouterr().out


def test_other_hyperparameters_are_another_run(tmp_path):
    run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network())
    model = tiny.Network()
    run(tiny.options(tmp_path, lr=0.04), tiny.benchmark(), model)
    assert model.n_training_batches > 0
    assert len(list(tmp_path.rglob("summary.json"))) == 2


def test_a_folder_that_another_process_holds(tmp_path):
    run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network())
    folder = tiny.run_folder(tmp_path)
    hold = f"""
import filelock
with filelock.FileLock({str(folder / ".lock")!r}):
    print("held", flush=True)
    input()
"""
    command = [sys.executable, "-c", hold]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(InputError, match="at work in .*choose another"):
            run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network())
        other.communicate("\n")
    run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to .*choose another folder"):
        run(tiny.options(tmp_path / "file"), tiny.benchmark(), tiny.Network())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": (0.9, 0.9, 0.9)}, "threshold has 3 values; give one, or one for each of the 2 layers: fc1, fc2"),
        (
            {"threshold": (0.1,), "threshold_step": -0.1},
            r"threshold 0.1 with -0.1 \(threshold_step\) more for each later task is -0.1; it must be positive",
        ),
        ({"n_epochs": 5.5}, "n_epochs is 5.5; it must be a whole number"),
        ({"lr": True}, "lr is True; it must be a number"),
        ({"lr": "0.01"}, "lr is '0.01'; it must be a number"),
        ({"lr": None}, "lr is None; it must be a number"),
        ({"seed": 2.5}, "seed is 2.5; it must be a whole number"),
        ({"n_tasks": None}, "n_tasks is None; it must be a whole number"),
        ({"threshold": 0.95}, r"threshold is 0.95; it must be a tuple such as \(0.97,\)"),
        ({"threshold": ()}, r"threshold is \(\); it must be a tuple such as"),
        ({"n_samples": "some"}, "n_samples is 'some'; it must be a whole number or 'all'"),
        ({"samples": {"fc1": 2.5}}, r"samples is \{'fc1': 2.5\}; it must be a dict of a whole number by layer"),
        ({"protocol": "draft"}, "protocol is 'draft'; it must be one of paper, released"),
        ({"tf32": 1}, "tf32 is 1; it must be True or False"),
        ({"output_dir": None}, "output_dir is None; it must be text"),
        ({"samples": {"fc9": 5}}, "samples names 'fc9', which is no layer; the layers are: fc1, fc2"),
        ({"samples": {"fc1": 50}}, r"samples fc1 is 50; it must be in \[1, n_samples = 10\]"),
        ({"device": "tpu"}, "device 'tpu' is not available here; use one of: auto, cpu"),
        ({"lr": float("nan")}, "lr is nan; it must be positive"),
        ({"schedule": "plateau", "pc_valid": 0.0}, "pc_valid is 0.0; it must be positive for --schedule plateau"),
    ],
    ids=lambda value: "" if isinstance(value, str) else ",".join(value),
)
def test_options_that_no_run_can_use(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        run(tiny.options(tmp_path, **changes), tiny.benchmark(), tiny.Network())


def test_all_training_images_may_be_samples(tmp_path):
    # 126 images: the last batch of samples must not be a single one, which BatchNorm1d cannot take.
    options = tiny.options(tmp_path, n_samples="all", n_epochs=1, n_tasks=2)
    summary = run(options, tiny.benchmark(2, n_train=126), tiny.Network())
    assert summary["memory_columns"]["fc1"][-1] > 0


def test_all_samples_are_all_training_images_once(tmp_path):
    method = GPM(tiny.Network(), tiny.options(tmp_path, n_samples="all"))
    train = tiny.task(0, n_train=126 * 3).train
    images, _ = method.representative(0, train)
    assert sorted(map(tuple, torch.cat(list(images)).tolist())) == sorted(map(tuple, train.images.tolist()))


@pytest.mark.parametrize("eval_train", [False, True])
def test_training_images_are_evaluated_only_on_request(tmp_path, monkeypatch, eval_train):
    evaluated, evaluate = [], training.evaluate

    def counted(model, t, split, batch_size):
        evaluated.append(len(split.labels))
        return evaluate(model, t, split, batch_size)

    monkeypatch.setattr(training, "evaluate", counted)
    run(tiny.options(tmp_path, eval_train=eval_train), tiny.benchmark(), tiny.Network())
    assert {epoch["train_accuracy"] is not None for epoch in tiny.epochs(tmp_path)} == {eval_train}
    assert set(evaluated) == ({9, 30} if eval_train else {9})


def test_a_small_network_takes_one_thread_for_the_length_of_its_run(tmp_path, monkeypatch):
    threads = torch.get_num_threads()
    used = []
    order = training.seeded_order
    monkeypatch.setattr(training, "seeded_order", lambda *args: used.append(torch.get_num_threads()) or order(*args))
    torch.set_num_threads(2)
    try:
        run(tiny.options(tmp_path, n_tasks=1), tiny.benchmark(1), tiny.Network())
        assert set(used) == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_a_continued_run_takes_the_threads_that_it_began_with(tmp_path, capsys):
    """Their number decides in which order sums are made, and so the last bits."""

    class Cut(Exception):
        pass

    class Network(tiny.Network):  # with a convolution, so that it does not take one thread of itself
        def __init__(self, stop: bool) -> None:
            super().__init__()
            self.conv, self.stop, self.threads = torch.nn.Conv2d(1, 1, 1).double(), stop, set()

        def forward(self, images, task):
            self.threads.add(torch.get_num_threads())
            if self.stop and task == 1 and self.training and len(images) > 2:  # not where it is tried beforehand
                raise Cut
            return super().forward(images, task) + 0 * self.conv(images[:1, None, None]).sum()

    threads, options = torch.get_num_threads(), tiny.options(tmp_path, n_tasks=2, quiet=False)
    try:
        torch.set_num_threads(2)
        with pytest.raises(Cut):
            run(options, tiny.benchmark(2), Network(stop=True))
        torch.set_num_threads(1)
        model = Network(stop=False)
        run(options, tiny.benchmark(2), model)
        assert model.threads == {2}
        assert torch.get_num_threads() == 1
        assert "with 2 threads, as it began" in capsys.readouterr().out
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(("device", "current"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", [])])
def test_a_gpu_that_is_named_becomes_the_current_one(monkeypatch, device, current):
    """Streams and CUDA graphs are made on the current device, whatever tensors they work on."""
    set_to = []
    monkeypatch.setattr(torch.cuda, "set_device", set_to.append)
    hardware.tune(torch.device(device), tiny.Network(), Options())
    assert set_to == current


@pytest.mark.parametrize("tf32", [True, False])
def test_one_kind_of_flag_lets_products_round_and_the_projection_spares_itself(tf32):
    flags = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in flags]
    try:
        hardware.tune(torch.device("cpu"), tiny.Network(), Options(tf32=tf32))
        assert {backend.allow_tf32 for backend in flags} == {tf32}
        with full_float32(SimpleNamespace(is_cuda=True)):
            assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cuda.matmul.allow_tf32 == tf32  # and torch does not refuse to read it
    finally:
        for backend, value in zip(flags, before, strict=True):
            backend.allow_tf32 = value


def test_tensorboard_counts_the_epochs_of_all_tasks(tmp_path):
    class Board:
        def __init__(self) -> None:
            self.steps = set()

        def add_scalar(self, name, value, step):
            self.steps.add(step)

        def close(self):
            pass

    progress = Progress("tiny", tiny.options(tmp_path, n_epochs=7), tmp_path, done=1)  # continued within task 2
    progress.board = Board()
    progress.epoch(Epoch(1, 4, 0.1, 1.0, None, 1.0, 50.0, 0.1))
    progress.close()
    assert progress.board.steps == {7 + 4}
    jointly = Progress("tiny", tiny.options(tmp_path, n_epochs=7), tmp_path, first=2)
    jointly.board = Board()
    jointly.epoch(Epoch(2, 4, 0.1, 1.0, None, 1.0, 50.0, 0.1))
    assert jointly.board.steps == {4}


def test_the_groups_of_a_layer_are_one_entry_of_the_memorys_line(tmp_path, capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Flatten(), nn.Linear(16, 2, bias=False))
    memory = GradientProjectionMemory(model)
    memory.update(model, [torch.randn(40, 4, 4, 4)], threshold={"0": 0.5, "2": 1.0})
    progress = Progress("tiny", replace(tiny.options(tmp_path), quiet=False), tmp_path, done=0)
    progress.task(0, "first", [[50.0]], memory)
    progress.close()
    said = capsys.readouterr().out
    k = sum(memory.columns[f"0[{g}]"] for g in range(4))
    assert f"columns of the most possible: 0 {k}/36 ({100 * k / 36:.0f} %), 2 16/16 (100 %)\n" in said
    assert "memory is full, so these layers can no longer learn: 2\n" in said
