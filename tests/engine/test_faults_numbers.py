"""Numbers that go wrong: divergence is named, odd representations are handled, and no step leaks into the memory."""

import json
import re

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from engine import experiment
from engine.files import write_text
from engine.folder import DIVERGED, NEWEST
from engine.seeds import generator
from engine.task import Benchmark, Split, Task
from gradproj import GradientProjectionMemory
from gradproj.errors import DivergenceError, InputError
from methods import METHODS
from tests.faults import COUNTS, Normalised, TwoLayers, benchmark, fork_and_wait, options, outcome, small_run
from tests.tiny import run

pytestmark = pytest.mark.usefixtures("quick")


class TestDivergence:
    def test_exit_code_and_one_line(self, tmp_path):
        code = fork_and_wait(lambda: small_run(tmp_path / "run", lr=1e30), tmp_path / "log")
        assert code == 3
        (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if "error:" in line]
        assert re.search(
            r"error: the loss is no longer finite: task 1, epoch 1, step \d+, .* went first; lr was 1", line
        )
        assert "Traceback" not in (tmp_path / "log").read_text()

    @pytest.mark.parametrize("step", ["auto", "eager"])
    def test_names_the_step_and_layer(self, tmp_path, step):
        """One image is too large: the first layer goes first, in the step that comes to this image."""
        bad = benchmark()
        task = bad.tasks[1]
        spoilt = Split(task.train.images.clone(), task.train.labels)
        order = torch.randperm(60, generator=generator(1, "order", 1, 0))
        spoilt.images[order[35]] = 3e38
        tasks = [bad.tasks[0], Task("spoilt", 3, spoilt, task.valid, task.test), bad.tasks[2]]
        with pytest.raises(DivergenceError) as caught:
            run(options(tmp_path, step=step), Benchmark("maps", "synthetic", tasks), scaled(100))
        place = re.search(r"task 2, epoch 1, step (\d), the outputs of layer (\w+) went first", str(caught.value))
        assert place[1] == "4"  # of ten images each
        assert place[2] == "fc1"

    def test_checkpoint_stays_and_another_lr_runs_in_another_folder(self, tmp_path, monkeypatch):
        """The loss overflows in the second task; what was saved before goes on once the cause is gone."""
        small_run(tmp_path / "whole")

        def overflow(method, t, task):
            if t == 1:
                method.model.fc1.weight.data.fill_(1e38)

        states = []
        with monkeypatch.context() as patch:
            patch.setattr(METHODS["gpm"], "before_task", overflow)
            for _ in range(2):
                with pytest.raises(DivergenceError, match="task 2, epoch 1, step"):
                    small_run(tmp_path / "run")
                states.append((tmp_path / "run" / NEWEST).read_bytes())
                assert "task 2, epoch 1, step" in (tmp_path / "run" / DIVERGED).read_text()
        assert states[0] == states[1]
        with pytest.raises(InputError, match="lr 0.2 there, 0.1 here"):
            small_run(tmp_path / "run", lr=0.1)
        assert small_run(tmp_path / "other", lr=0.1)["finished"]
        small_run(tmp_path / "run")
        assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
        assert not (tmp_path / "run" / DIVERGED).exists()

    def test_is_told_though_its_note_cannot_be_written(self, tmp_path, monkeypatch):
        def full(path, text):
            if path.name == DIVERGED:
                raise InputError("no space left")
            write_text(path, text)

        monkeypatch.setattr(experiment, "write_text", full)
        bad = benchmark()
        with pytest.raises(DivergenceError, match="task 1, epoch 1, step"):
            run(options(tmp_path, lr=1e30), Benchmark("maps", "synthetic", bad.tasks), scaled(1e12))

    def test_in_the_very_last_step_without_validation(self, tmp_path):
        """No loss is measured after it: the weights tell."""
        bad = benchmark(pc_valid=0)
        settings = dict(n_tasks=1, n_epochs=1, batch_size_train=60, schedule="constant", lr=1e30, method="naive")
        with pytest.raises(DivergenceError, match="task 1, epoch 1, step 1, weights fc.* went first"):
            run(options(tmp_path, **settings), Benchmark("maps", "synthetic", bad.tasks), scaled(1e12))

    def test_plateau_without_validation_images(self, tmp_path):
        with pytest.raises(InputError, match="schedule is plateau, but map 0 has no validation images"):
            run(options(tmp_path), benchmark(pc_valid=0), TwoLayers())


def scaled(factor: float) -> nn.Module:
    torch.manual_seed(0)
    model = TwoLayers()
    with torch.no_grad():
        model.fc1.weight.mul_(factor)
    return model


class TestRepresentations:
    """What `memory.update` is given."""

    @pytest.fixture
    def memory(self) -> GradientProjectionMemory:
        torch.manual_seed(0)
        return GradientProjectionMemory(TwoLayers())

    @pytest.mark.parametrize("n", [3, 40])  # fewer samples than inputs, and more
    def test_all_zero(self, memory, n):
        memory.update(memory.model, [torch.zeros(n, 12)], 0.9)
        assert memory.columns == {"fc1": 0, "fc2": 0}
        memory.update(memory.model, [torch.randn(n, 12)], 0.9)
        before = memory.columns
        memory.update(memory.model, [torch.zeros(n, 12)], 0.9)
        assert memory.columns == before
        COUNTS["odd representations"] += 2

    @pytest.mark.parametrize("n", [4, 40])
    @pytest.mark.parametrize("rank", [1, 2, 3])
    def test_rank_deficient(self, memory, n, rank):
        factors = torch.randn(n, rank), torch.randn(rank, 12)
        memory.update(memory.model, [factors[0] @ factors[1]], 1.0)
        assert memory.columns["fc1"] == rank
        basis = memory.bases["fc1"]
        assert_close(basis.T @ basis, torch.eye(rank, dtype=torch.float64))
        memory.update(memory.model, [torch.randn(n, rank) @ factors[1]], 1.0)
        assert memory.columns["fc1"] == rank
        COUNTS["odd representations"] += 2

    @pytest.mark.parametrize("n", [4, 40])
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_non_finite(self, memory, n, value):
        memory.update(memory.model, [torch.randn(n, 12)], 0.5)
        before = dict(memory.bases)
        images = torch.randn(n, 12)
        images[1, 2] = value
        with pytest.raises(DivergenceError, match="inputs of layer fc1 are infinite or NaN"):
            memory.update(memory.model, [images], 0.5)
        assert all(memory.bases[key] is basis for key, basis in before.items())
        assert memory.n_updates == 1
        COUNTS["odd representations"] += 1

    @pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15])
    def test_very_small_and_large(self, memory, scale):
        images = torch.randn(40, 12, dtype=torch.float64)
        memory.model.double()
        memory.update(memory.model, [images], 0.8)
        expected = memory.columns
        other = GradientProjectionMemory(memory.model)
        other.update(memory.model, [images * scale], 0.8)
        assert other.columns == expected
        COUNTS["odd representations"] += 1

    def test_a_run_on_black_images(self, tmp_path):
        bad = benchmark()
        bad.tasks[0].train.images.zero_()
        summary = run(options(tmp_path), bad, TwoLayers())
        assert summary["memory_columns"]["fc1"][0] == 0
        assert summary["memory_columns"]["fc1"][-1] > 0


class TestLeak:
    @pytest.mark.parametrize("step", ["auto", "eager"])
    @pytest.mark.parametrize("model", [TwoLayers, Normalised])
    @pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-3), (torch.float64, 1e-10)])
    def test_is_rounding(self, tmp_path, step, model, dtype, most):
        small_run(tmp_path, model, dtype, step=step, lr=0.05)
        lines = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
        leaks = [value for line in lines if line["task"] > 0 for value in line["leak"].values()]
        assert len(leaks) >= 6
        assert max(leaks) < most
        assert max(leaks) > 0

    def test_is_what_it_says(self):
        torch.manual_seed(0)
        model = TwoLayers().double()
        memory = GradientProjectionMemory(model)
        memory.update(model, [torch.randn(40, 12, dtype=torch.float64)], 0.5)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            moved = torch.randn_like(model.fc1.weight)
            model.fc1.weight += moved
        leak = memory.leak(before)
        basis = memory.bases["fc1"]
        assert_close(leak["fc1"], ((moved @ basis).norm() / moved.norm()).item())
        assert 0.1 < leak["fc1"] < 1
        assert leak["fc2"] is None  # has not moved

    def test_nothing_is_said_of_full_layers(self, tmp_path):
        summary = small_run(tmp_path, threshold=(1.0,))
        assert summary["memory_columns"] == {"fc1": [12] * 3, "fc2": [8] * 3}
        lines = [json.loads(line) for line in (tmp_path / "epochs.jsonl").read_text().splitlines()]
        assert {value for line in lines if line["task"] > 0 for value in line["leak"].values()} == {None}

    def test_full_layers_are_announced(self, tmp_path, capsys):
        small_run(tmp_path, threshold=(1.0,), quiet=False)
        assert "memory is full, so these layers can no longer learn: fc1, fc2" in capsys.readouterr().out
        small_run(tmp_path / "soft", threshold=(1.0,), quiet=False, method="sgp")
        assert "memory is full, so all directions are held to some degree: fc1, fc2" in capsys.readouterr().out
