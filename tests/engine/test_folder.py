"""What a run folder is called, refuses, gives back and repeats."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import main_pmnist
from dataloader.embedded import render as embedded
from engine import load_run
from engine.cli import parse
from engine.evaluation import evaluate
from engine.folder import NEWEST, run_folder
from engine.options import Options, hyperparameters, with_flags
from engine.task import Benchmark, LazyTasks
from gradproj.errors import InputError
from gradproj.normalization import fixed_statistics
from methods import METHODS
from methods.gpm import GPM
from models import MLP
from tests.faults import Normalised, TwoLayers, benchmark, options, outcome, small_run
from tests.tiny import run

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def pmnist(tmp_path, monkeypatch):
    """main_pmnist on twenty embedded images of each part."""
    monkeypatch.setitem(embedded.RECIPES, "mnist", embedded.RECIPES["mnist"]._replace(n_train=4, n_test=2))
    base = ["--data", "embedded", "--n_tasks", "2", "--n_epochs", "2", "--n_samples", "9", "--device", "cpu", "--quiet"]
    base += ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "runs")]
    return lambda *flags: main_pmnist.main([*base, *flags])


def found(tmp_path):
    return {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("summary.json")}


def test_name_says_what_differs(tmp_path):
    named = options(tmp_path, run_folder=None, output_dir="out", seed=7, lr=0.5, samples={"fc1": 3})
    folder = str(run_folder(named, GPM, "pmnist", "real"))
    assert folder.startswith("out/real/pmnist/gpm/")
    assert folder.endswith("/seed-7")
    assert "lr=0.5" in folder
    assert "samples=fc13" in folder
    assert "seed=" not in folder


def test_folder_holds_what_it_should(tmp_path):
    small_run(tmp_path)
    visible = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert visible == {"config.json", "epochs.jsonl", "accuracy.csv", "summary.json", NEWEST}
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} <= {".lock"}


class TestClash:
    def test_names_all_that_differs(self, tmp_path):
        small_run(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(InputError) as caught:
            small_run(tmp_path, lr=0.1, seed=5, quiet=False)
        message = str(caught.value)
        assert "lr 0.2 there, 0.1 here; seed 1 there, 5 here" in message
        assert "quiet" not in message
        assert "\n" not in message
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_also_where_the_checkpoint_was_deleted(self, tmp_path):
        small_run(tmp_path)
        (tmp_path / NEWEST).unlink()
        before = (tmp_path / "summary.json").read_bytes()
        with pytest.raises(InputError, match=r"lr 0.2 there, 0.1 here\)"):
            small_run(tmp_path, lr=0.1)
        small_run(tmp_path)
        assert (tmp_path / "summary.json").read_bytes() == before

    def test_no_resume_begins_anew(self, tmp_path, capsys):
        small_run(tmp_path)
        small_run(tmp_path, lr=0.1, no_resume=True, quiet=False)
        assert "continued" not in capsys.readouterr().out
        assert json.loads((tmp_path / "summary.json").read_text())["hyperparameters"]["lr"] == 0.1

    def test_another_network_with_the_same_hyperparameters(self, tmp_path):
        small_run(tmp_path)
        with pytest.raises(
            InputError, match=r"run of another network \(fc1.weight 8x12 float32 there, 5x12.* here\); .*--no"
        ):
            small_run(tmp_path, lambda: TwoLayers(5))

    def test_other_images_than_before(self, tmp_path):
        """A run goes on, or shows its summary, only on the images it began with."""

        def go(train: str, **changes) -> dict:
            data = dataclasses.replace(benchmark(), sources={"maps": {"train_sha256": train, "test_sha256": "b"}})
            torch.manual_seed(0)
            return run(options(tmp_path, **changes), data, TwoLayers())

        go("a")
        with pytest.raises(InputError, match="holds a run on other images of maps than are there now; give those back"):
            go("c")
        (tmp_path / NEWEST).unlink()
        with pytest.raises(InputError, match="other images of maps"):
            go("c")
        assert go("c", no_resume=True)["data"]["sources"]["maps"]["train_sha256"] == "c"

    def test_a_folder_of_another_program(self, tmp_path):
        (tmp_path / NEWEST).write_bytes(b"somebody's weights")
        (tmp_path / ".notes.tmp").write_text("mine")
        (tmp_path / ".summary.json.abc.tmp").write_text("half of a summary")
        with pytest.raises(InputError, match="holds checkpoint.pt of another program; choose another folder"):
            small_run(tmp_path)
        assert (tmp_path / NEWEST).read_bytes() == b"somebody's weights"
        (tmp_path / NEWEST).unlink()
        small_run(tmp_path)
        assert (tmp_path / ".notes.tmp").read_text() == "mine"
        assert not (tmp_path / ".summary.json.abc.tmp").exists()

    @pytest.mark.parametrize("name", ["config.json", "epochs.jsonl", "summary.json", "accuracy.png"])
    def test_other_files_of_another_program(self, tmp_path, name):
        """Neither overwritten nor deleted, whatever the flags."""
        (tmp_path / name).write_text('{"mine": true}')
        (tmp_path / "weights-best.pt").write_text("mine")
        for no_resume in (False, True):
            with pytest.raises(InputError, match=f"holds {name} of another program; choose another folder"):
                small_run(tmp_path, no_resume=no_resume)
        assert (tmp_path / name).read_text() == '{"mine": true}'
        (tmp_path / name).unlink()
        small_run(tmp_path)
        small_run(tmp_path, no_resume=True)
        assert (tmp_path / "weights-best.pt").read_text() == "mine"

    def test_a_checkpoint_that_the_system_does_not_let_be_read(self, tmp_path, monkeypatch):
        small_run(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
        read = Path.read_bytes

        def closed(path):
            if path.name == NEWEST:
                raise PermissionError(13, "Permission denied")
            return read(path)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "read_bytes", closed)
            with pytest.raises(
                InputError, match="^cannot read .*checkpoint.pt: Permission denied; nothing was changed$"
            ):
                small_run(tmp_path)
        assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}

    @pytest.mark.parametrize("name", ["output_dir", "run_folder", "data_dir"])
    def test_no_folder(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(InputError, match=f"^{name} is empty; it must be the path of a folder$"):
            small_run(tmp_path, **{name: ""})
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("summary", ['{"finished": true}', "[]", '{"finished": true, "hyperparameters": {}}'])
    def test_a_summary_that_says_nothing_is_made_again(self, tmp_path, summary):
        small_run(tmp_path)
        expected = (tmp_path / "summary.json").read_text()
        (tmp_path / "summary.json").write_text(summary)
        small_run(tmp_path)
        assert (tmp_path / "summary.json").read_text() == expected


class TestSaysSo:
    def test_resumed_run(self, tmp_path, capsys):
        with pytest.raises(InputError, match="map 2 has no validation images"):
            tasks = [*benchmark().tasks[:2], benchmark(pc_valid=0).tasks[2]]
            torch.manual_seed(0)
            run(options(tmp_path), Benchmark("maps", "synthetic", LazyTasks(3, tasks.__getitem__)), TwoLayers())
        small_run(tmp_path, quiet=False)
        assert "continued from its checkpoint at task 3/3" in capsys.readouterr().out

    def test_finished_run(self, tmp_path, capsys):
        small_run(tmp_path)
        before = (tmp_path / "summary.json").stat().st_mtime_ns
        capsys.readouterr()
        small_run(tmp_path)
        assert "finished already" in capsys.readouterr().out
        assert (tmp_path / "summary.json").stat().st_mtime_ns == before

    def test_a_finished_runs_matrix_is_written_again(self, tmp_path):
        small_run(tmp_path)
        matrix = (tmp_path / "accuracy.csv").read_bytes()
        (tmp_path / "accuracy.csv").unlink()
        small_run(tmp_path)
        assert (tmp_path / "accuracy.csv").read_bytes() == matrix


class TestLoadRun:
    @pytest.mark.parametrize("model", [TwoLayers, Normalised])
    def test_model_has_the_accuracy_of_the_summary(self, tmp_path, model):
        summary = small_run(tmp_path, model)
        loaded = load_run(tmp_path)
        assert type(loaded.model) is model
        accuracies = [evaluate(loaded.model, t, task.test, 64)[1] for t, task in enumerate(benchmark().tasks)]
        assert accuracies == summary["accuracy"][-1] == loaded.summary["accuracy"][-1]
        assert loaded.memory.columns == {key: k[-1] for key, k in summary["memory_columns"].items()}
        assert loaded.config["hyperparameters"]["lr"] == 0.2
        assert not loaded.model.training

    def test_with_task_statistics(self, tmp_path):
        summary = small_run(tmp_path, Normalised, batchnorm="task")
        loaded = load_run(tmp_path)
        for t, task in enumerate(benchmark().tasks):
            with fixed_statistics(loaded.model, loaded.statistics[t]):
                assert evaluate(loaded.model, t, task.test, 64)[1] == summary["accuracy"][-1][t]

    def test_of_a_script(self, pmnist, tmp_path):
        summary = pmnist("--n_hidden", "7")
        (folder,) = (tmp_path / "runs").rglob("seed-2")
        loaded = load_run(folder)
        assert isinstance(loaded.model, MLP)
        assert loaded.summary == json.loads(json.dumps(summary))
        assert loaded.model.fc1.weight.shape == (7, 784)

    def test_memory_goes_on_protecting(self, tmp_path):
        small_run(tmp_path)
        loaded = load_run(tmp_path)
        with loaded.memory.protect():
            loaded.model(torch.randn(5, 12)).square().sum().backward()
        basis = loaded.memory.bases["fc1"].float()
        assert_close(loaded.model.fc1.weight.grad @ basis, torch.zeros(8, basis.shape[1]), atol=1e-5, rtol=0)

    def test_unfinished_run(self, tmp_path):
        small_run(tmp_path)
        (tmp_path / "summary.json").unlink()
        assert load_run(tmp_path).summary is None

    def test_another_model_given(self, tmp_path):
        small_run(tmp_path)
        assert load_run(tmp_path, TwoLayers()).memory is not None
        with pytest.raises(InputError, match="weights in .* are not of a TwoLayers like this: .*fc2 differ"):
            load_run(tmp_path, TwoLayers(4))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (None, r"has no config.json; delete its summary.json and run its command again, which writes both"),
            (b"", "config.json is not the config.json of a run: JSONDecodeError"),
            (b"\xff\xfe", "config.json is not the config.json of a run: UnicodeDecodeError"),
            (b"[]", "config.json is not the config.json of a run: TypeError"),
            (b"{}", "config.json is not the config.json of a run: KeyError"),
            (b'{"model": 3}', "cannot build the model 3 .*; give load_run the model"),
            (b'{"model": {"class": "TwoLayers", "arguments": {}}}', "cannot build the model"),
            (b'{"model": {"class": "no.Such", "arguments": {}}}', "cannot build the model"),
            (b'{"model": {"class": "tests.faults.TwoLayers", "arguments": {"x": 1}}}', "cannot build the model"),
            (b'{"model": {"class": "builtins.dict", "arguments": {}}}', "builtins.dict is not a model"),
        ],
    )
    def test_damaged_config(self, tmp_path, content, message):
        small_run(tmp_path)
        (tmp_path / "config.json").unlink() if content is None else (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(InputError, match=message) as caught:
            load_run(tmp_path)
        assert "\n" not in str(caught.value)

    def test_without_checkpoint(self, tmp_path):
        small_run(tmp_path)
        (tmp_path / NEWEST).unlink()
        with pytest.raises(InputError, match="has no checkpoint that can be read"):
            load_run(tmp_path)

    def test_network_of_a_task_that_was_not_learned(self, tmp_path):
        small_run(tmp_path)
        loaded = load_run(tmp_path)
        for t in (-1, loaded.n_learned):
            with pytest.raises(InputError, match=f"^task {t} is not one of the {loaded.n_learned} that this run has"):
                loaded.network(t)


class TestConfig:
    FLAGS = ("--lr", "0.05", "--n_hidden", "9", "--samples", "fc1=3", "fc2=4", "--threshold", "0.9", "--eval_train")

    def test_of_another_method_gives_what_was_typed_alone(self, tmp_path):
        path = tmp_path / "config.json"
        values = ["--method", "trgp", "--region_images", "77", "--lr", "0.02"]
        made, _ = parse(main_pmnist.Hyperparameters, METHODS, values, "")
        path.write_text(json.dumps({"hyperparameters": dataclasses.asdict(made)}))
        repeated, _ = parse(main_pmnist.Hyperparameters, METHODS, ["--config", str(path), "--method", "cuber"], "")
        plain, _ = parse(main_pmnist.Hyperparameters, METHODS, ["--method", "cuber"], "")
        assert repeated == dataclasses.replace(plain, region_images=77, lr=0.02)
        assert made.region_threshold != plain.region_threshold

    def test_repeats_a_run(self, pmnist, tmp_path):
        first = pmnist(*self.FLAGS)
        (folder,) = (tmp_path / "runs").rglob("seed-2")
        again = main_pmnist.main(["--config", str(folder / "config.json"), "--output_dir", str(tmp_path / "again")])
        (other,) = (tmp_path / "again").rglob("seed-2")
        assert other.relative_to(tmp_path / "again") == folder.relative_to(tmp_path / "runs")
        assert again["accuracy"] == first["accuracy"]
        assert outcome(other) == outcome(folder)

    def test_further_flags_change_it(self, pmnist, tmp_path):
        pmnist(*self.FLAGS)
        (path,) = (tmp_path / "runs").rglob("config.json")
        command = ["--seed", "4", "--config", str(path), "--lr", "0.1"]
        parsed, _ = parse(main_pmnist.Hyperparameters, METHODS, command, "")
        assert (parsed.seed, parsed.lr, parsed.n_hidden, parsed.threshold) == (4, 0.1, 9, (0.9,))
        assert parsed.samples == {"fc1": 3, "fc2": 4}
        assert parsed.eval_train is True

    @pytest.mark.parametrize(
        "changes",
        [
            {"method": "gpm", "threshold": (0.1, 0.2, 0.3), "samples": {"fc1": 2}},
            {"method": "gpm", "n_samples": "all", "samples": {}},
            {"method": "er", "replay_batch": 2},
            {"method": "ogd", "lr": 0.01},
        ],
        ids=str,
    )
    def test_repeats_every_value(self, tmp_path, changes):
        method = METHODS[changes["method"]]
        made = with_flags(main_pmnist.Hyperparameters, method)(**{"lr": 1e-4, "n_train": 3, "tf32": True, **changes})
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"hyperparameters": hyperparameters(made, method)}))
        assert parse(main_pmnist.Hyperparameters, METHODS, ["--config", str(path)], "") == (made, method)

    def test_from_when_every_run_had_the_flags_of_all_methods(self, tmp_path):
        path = tmp_path / "config.json"
        old = {"method": "naive", "lr": 0.5, "threshold": [0.95, 0.99, 0.99], "ewc_lambda": 10.0, "owm_alpha": 100.0}
        path.write_text(json.dumps({"hyperparameters": old}))
        assert parse(main_pmnist.Hyperparameters, METHODS, ["--config", str(path)], "")[0].lr == 0.5
        path.write_text(json.dumps({"hyperparameters": old | {"ewc_lambda": 3.0}}))
        with pytest.raises(InputError, match="is of another script or method: it has ewc_lambda$"):
            parse(main_pmnist.Hyperparameters, METHODS, ["--config", str(path)], "")

    def test_of_another_script(self, pmnist, tmp_path):
        pmnist()
        (path,) = (tmp_path / "runs").rglob("config.json")
        with pytest.raises(InputError, match="is of another script or method: it has n_hidden, n_outputs$"):
            parse(Options, METHODS, ["--config", str(path)], "")

    def test_from_before_a_flag_was_there(self, tmp_path):
        path = tmp_path / "config.json"
        path.write_text(json.dumps({"hyperparameters": {"lr": 0.3, "threshold": [0.8, 0.9, 0.9]}}))
        expected = main_pmnist.Hyperparameters(lr=0.3, threshold=(0.8, 0.9, 0.9))
        assert vars(parse(main_pmnist.Hyperparameters, METHODS, ["--config", str(path)], "")[0]) == vars(expected)


def test_tensorboard_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="^--tensorboard needs a package that is not here: pip install tensorboard$"):
        small_run(tmp_path, tensorboard=True)
    small_run(tmp_path)
