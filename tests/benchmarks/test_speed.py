"""The speed benchmark runs and records; what it measures is no test's business."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from benchmarks import plain, speed, suite, table
from benchmarks.cases import CASES, Case
from benchmarks.measure import Spread, Stopwatch, interleaved, ratios
from engine.options import Options
from methods.gpm import GPM
from models import MLP
from tests import reference


class Convolutional(nn.Module):
    """A strided convolution, a Linear and two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, stride=2, bias=False)
        self.fc = nn.Linear(16, 6, bias=False)
        self.heads = nn.ModuleList(nn.Linear(6, 3, bias=False) for _ in range(2))

    def forward(self, images: Tensor, task: int) -> Tensor:
        return self.heads[task](F.relu(self.fc(F.relu(self.conv(images)).flatten(1))))


CPU = torch.device("cpu")
SMALL = suite.Effort(rounds=2, repetitions=1, plain_layers=1)
OPTIONS = Options(batch_size_train=4, batch_size_test=8, n_samples=6)
WITH_SAMPLES = dataclasses.replace(OPTIONS, samples={"conv": 4, "fc": 6})
TINY = {
    "mlp": Case("tiny MLP", lambda: MLP(12, 8, 3), OPTIONS, (12,), 3, n_train=42, n_valid=8, pool=16, steps=2),
    "lenet": Case("tiny CNN", Convolutional, WITH_SAMPLES, (2, 5, 5), 3, n_train=42, n_valid=8, pool=16, steps=1),
}


@pytest.fixture
def small(monkeypatch):
    """Cases and matrix products that take no time; the thread count is put back."""
    threads = torch.get_num_threads()
    monkeypatch.setattr("benchmarks.cases.CASES", TINY)
    monkeypatch.setattr("benchmarks.suite.QUICK", SMALL)
    monkeypatch.setattr("benchmarks.measure.MATRIX_SIZE", 64)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        monkeypatch.setenv(name, str(threads))
    yield
    torch.set_num_threads(threads)


def test_one_command_measures_records_and_prints(small, tmp_path, capsys):
    argv = ["--quick", "--device", "cpu", "--threads", "1", "--clock", "cpu", "--name", "here"]
    speed.main([*argv, "--output_dir", str(tmp_path), "--only", "mlp"])
    speed.main([*argv, "--output_dir", str(tmp_path), "--only", "lenet"])
    results = json.loads((tmp_path / "here-quick.json").read_text())
    assert list(results) == ["mlp", "lenet"]
    mlp, cnn = results["mlp"], results["lenet"]
    assert list(mlp["steps"]) == ["by hand", "eager"]
    assert list(cnn["steps"]) == ["eager"]
    assert list(cnn["steps"]["eager"]["ratio"]) == ["projected", "dense"]
    assert mlp["columns"] == {"fc1": [6, 12], "fc2": [4, 8], "fc3": [4, 8]}
    assert mlp["epoch"]["steps"] == 11  # 42 images, 4 a batch
    assert mlp["memory"]["plain_layers"] == ["fc3"]
    assert {"hardware", "versions", "commit", "clock", "date"} <= mlp["environment"].keys()
    printed = capsys.readouterr().out
    assert "| tiny MLP, batch 4, 1 thread, by hand |" in printed
    assert "| tiny CNN, batch 4, 1 thread, eager |" in printed


def test_ratios_and_the_floor_are_the_right_way_up(monkeypatch):
    seconds = {"alone": 2.0, "projected": 3.0, "dense": 5.0, "ours": 1.0, "plain": 10.0}
    monkeypatch.setattr(
        suite,
        "interleaved",
        lambda variants, rounds, _: {name: [seconds[name.rpartition("/")[2]]] * rounds for name in variants},
    )
    monkeypatch.setattr(suite, "matrix_product_rate", lambda _: 1e6)
    case = TINY["lenet"]
    found = suite.measure(case, Stopwatch(CPU), SMALL)
    ratio = found["steps"]["eager"]["ratio"]
    assert (ratio["projected"]["median"], ratio["dense"]["median"]) == (1.5, 2.5)
    assert found["memory"]["ratio"]["median"] == 10
    assert found["floor"]["seconds"] == suite.count_flops(case, case.task(CPU)) / 1e6
    evaluation = case.n_valid / found["evaluation_images_per_second"]
    assert found["epoch"]["how"] == "estimated from its steps"  # 11 steps of 5 s are more than 30 s
    assert found["epoch"]["dense"] == pytest.approx(11 * 5 + evaluation)
    short = suite.measure_epoch(
        case, case.task(CPU), Stopwatch(CPU), suite.Effort(epoch_seconds=60), found["steps"], 1e9
    )
    assert (short["how"], round(short["projected"], 3), round(short["dense"], 3)) == ("measured", 3, 5)


def test_flops_of_a_step_are_those_of_its_matrix_products():
    forward = 2 * 4 * (12 * 8 + 8 * 8 + 8 * 3)
    backward = forward + 2 * 4 * (8 * 8 + 8 * 3)  # every weight, and the inputs of all layers but the first
    assert suite.count_flops(TINY["mlp"], TINY["mlp"].task(CPU)) == forward + backward


@pytest.mark.parametrize("case", list(TINY.values()), ids=list(TINY))
def test_the_dense_formula_takes_the_same_steps(case):
    case = dataclasses.replace(case, options=dataclasses.replace(OPTIONS, step="eager"))
    weights = [list(case.method(GPM, CPU).model.parameters())]
    for kind in (GPM, plain.DenseGPM):
        task = case.task(CPU)
        with suite.ExitStack() as stack:
            steps = suite.make(case, kind, task, "eager", stack)
            steps.optimizer.param_groups[0]["lr"] = 0.1
            steps.epoch(torch.arange(16))
        weights.append(list(steps.method.model.parameters()))
    start, ours, dense = weights
    assert_close(ours, dense, rtol=1e-4, atol=1e-5)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(start, ours, strict=True))


def test_the_plain_memory_update_spans_what_the_reference_does():
    random = np.random.default_rng(0)
    basis = np.linalg.qr(random.standard_normal((10, 3)))[0].astype(np.float32)
    columns = (random.standard_normal((10, 40)) * np.logspace(0, -2, 10)[:, None]).astype(np.float32)
    extended = plain.extend_basis(basis, columns, 0.97)
    assert reference.span_distance(extended, reference.extend_basis(basis, columns, 0.97)) < 1e-4


@pytest.mark.parametrize("stride", [1, 2])
def test_plain_patches_are_those_of_the_reference(stride):
    conv = torch.nn.Conv2d(2, 3, 3, stride, padding=1, bias=False)
    inputs = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = reference.conv_patches(inputs.numpy(), (3, 3), stride, 1)[0]
    assert_allclose(plain.representation(conv, inputs), expected, rtol=1e-6)


def test_variants_take_turns():
    calls = []
    times = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, Stopwatch(CPU))
    assert "".join(calls) == "abba"
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


def test_spread_is_the_median_and_the_quartiles():
    assert Spread.of([3.0]) == Spread(3, 3, 3)
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3, 2, 4)
    assert ratios({"a": [2.0, 6.0], "b": [1.0, 2.0]}, "a", "b").median == 2.5


def test_bases_are_orthonormal_and_of_the_size_that_is_stated():
    case = CASES["mlp"]
    bases = case.method(GPM, CPU).memory.bases
    assert {name: basis.shape[1] for name, basis in bases.items()} == dict(case.columns)
    for basis in bases.values():
        assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))


def test_the_table_is_put_between_its_markers(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    table.rewrite(readme, table.all_results(tmp_path))
    expected = f"before\n{table.BEGIN}\n{table.all_results(tmp_path)}\n{table.END}\nafter\n"
    assert readme.read_text() == expected
    assert "none was measured" in expected
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="must hold"):
        table.rewrite(readme, "")


def test_the_readmes_table_is_what_was_measured():
    expected = table.all_results(speed.HERE / "results")
    found = (speed.HERE.parent / "README.md").read_text().split(table.BEGIN)[1].split(table.END)[0].strip()
    assert found == expected, "run: python benchmarks/speed.py --no_run --readme README.md"


def test_processor_time_needs_one_thread(capsys):
    with pytest.raises(SystemExit):
        speed.parse(["--clock", "cpu"])
    assert "--threads 1" in capsys.readouterr().err
