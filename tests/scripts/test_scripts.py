"""The scripts end to end, on a few rendered images; and what they say to input that cannot be used."""

import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloader.embedded import render as embedded
from engine import hardware
from engine.cli import parse, script
from engine.options import Options, check, default_of, defaults, is_read, overridden, unread, variant, with_flags
from gradproj.errors import InputError
from methods import METHODS
from tests import ROOT

# Raw sets, further flags of a tiny run, most tasks.
SCRIPTS = {
    "main_pmnist": (["mnist"], ["--n_hidden", "20", "--n_outputs", "10"], None),
    "main_cifar100": (["cifar100"], [], 10),
    "main_cifar100_superclass": (["cifar100"], ["--t_order", "1"], 20),
    "main_five_datasets": (["notmnist", "mnist"], ["--datasets", "notmnist", "mnist"], 5),
    "main_miniimagenet": (["miniimagenet"], [], 20),
}
# Of method gpm.
FEW_SAMPLES = dict.fromkeys(
    ("main_five_datasets", "main_miniimagenet"), "--n_samples 10 --samples conv1=5 layer4=10".split()
)
# Flags of the authors' released scripts, which must keep their meaning.
RELEASED = (
    "--n_epochs 1 --batch_size_train 16 --batch_size_test 32 --seed 5 --pc_valid 0.2 --lr 0.02 --momentum 0.1 "
    "--lr_min 0.001 --lr_patience 2 --lr_factor 2"
).split()
TINY = ["--data", "embedded", "--n_tasks", "2", "--n_train", "5", "--device", "cpu", *RELEASED]

TINY_VARIANT = "n_tasks=2,n_train=5,n_epochs=1,batch_size_train=16"

every_script = pytest.mark.parametrize("name", SCRIPTS)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> Path:
    """Embedded sets with six training and three test images a class."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        for name in {name for names, _, _ in SCRIPTS.values() for name in names}:
            patch.setitem(embedded.RECIPES, name, embedded.RECIPES[name]._replace(n_train=6, n_test=3))
            embedded.load_raw(name, folder)
    return folder


def main(name: str, *arguments: object) -> dict:
    return importlib.import_module(name).main([str(argument) for argument in arguments])


@pytest.fixture
def tiny_run(data_dir):
    def call(name: str, output_dir: Path, *arguments: object) -> dict:
        flags = [*TINY, *SCRIPTS[name][1], *([] if "--method" in arguments else FEW_SAMPLES.get(name, []))]
        return main(name, *flags, "--data_dir", data_dir, "--output_dir", output_dir, *arguments)

    return call


def test_fewer_data_sets_are_fewer_tasks():
    options = importlib.import_module("main_five_datasets").Hyperparameters
    assert options().n_tasks == 5
    assert options(datasets=("mnist", "notmnist")).n_tasks == 2
    assert options(datasets=("mnist", "notmnist"), n_tasks=1).n_tasks == 1
    assert options(datasets=("mnist", "notmnist"), n_tasks=3).n_tasks == 3  # which the loader refuses


@every_script
def test_end_to_end_twice_to_the_same_numbers(name, tiny_run, tmp_path, capsys):
    summary = tiny_run(name, tmp_path / "first")
    out = capsys.readouterr().out
    (folder,) = [path.parent for path in (tmp_path / "first").rglob("summary.json")]
    assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
    for picture in ("accuracy.png", "memory.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert summary["finished"]
    assert summary["data"]["kind"] == "embedded"
    assert [[value is not None for value in row] for row in summary["accuracy"]] == [[True, False], [True, True]]
    assert summary["epochs"] == [1, 1]
    assert all(columns[0] <= columns[1] for columns in summary["memory_columns"].values())
    assert "embedded" in out
    assert f"ACC {summary['average_accuracy']:.2f} %, BWT {summary['backward_transfer']:+.2f}" in out
    expected = {"seed": 5, "lr": 0.02, "momentum": 0.1, "batch_size_train": 16, "batch_size_test": 32, "pc_valid": 0.2}
    assert expected.items() <= summary["hyperparameters"].items()

    again = tiny_run(name, tmp_path / "again", "--quiet")
    for key in ("accuracy", "valid_accuracy", "memory_columns"):
        assert again[key] == summary[key]


@pytest.mark.usefixtures("quick")
@every_script
def test_naive(name, tiny_run, tmp_path):
    summary = tiny_run(name, tmp_path, "--method", "naive", "--quiet")
    assert summary["method"] == "naive"
    assert not summary["memory_columns"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", ["main_pmnist", "main_cifar100_superclass"])
def test_released_protocol(name, tiny_run, tmp_path):
    paper, released = (
        tiny_run(name, tmp_path, "--protocol", protocol, "--threshold_step", 0, "--quiet")
        for protocol in ("paper", "released")
    )
    assert released["protocol"] == "released"
    first = {key: columns[0] for key, columns in released["memory_columns"].items()}
    if name == "main_pmnist":  # the same images, one column fewer after the first task
        assert first == {key: columns[0] - 1 for key, columns in paper["memory_columns"].items()}
    else:  # other images
        assert released["accuracy"] != paper["accuracy"]


def test_a_protocol_has_its_own_defaults_under_the_command_lines():
    def options(*argv: str) -> Options:
        return parse(importlib.import_module("main_miniimagenet").Hyperparameters, METHODS, argv, None)[0]

    paper, later, mine = options(), options("--protocol", "later"), options("--protocol", "later", "--n_epochs", "10")
    assert (paper.n_epochs, paper.batch_size_train, paper.pc_valid) == (10, 10, 0.02)
    plateau = (later.lr, later.lr_min, later.lr_patience, later.lr_factor, later.pc_valid, later.threshold)
    assert (later.n_epochs, later.batch_size_train, *plateau) == (100, 64, 0.1, 1e-3, 5, 3.0, 0.02, (0.985,))
    assert (mine.n_epochs, mine.batch_size_train) == (10, 64)
    named = [variant(each, METHODS["gpm"]) for each in (paper, later, mine)]
    assert named == ["default", "protocol=later", "protocol=later,n_epochs=10"]
    assert not overridden(later, METHODS["gpm"])  # no method takes anything from the script
    assert overridden(options("--protocol", "later", "--method", "hat"), METHODS["hat"]) == [
        "lr is 0.05, hat's own, instead of the script's 0.1"
    ]


def test_a_run_repeated_by_another_protocol_has_that_ones_defaults(tmp_path):
    kind = importlib.import_module("main_miniimagenet").Hyperparameters
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps({"hyperparameters": dataclasses.asdict(parse(kind, METHODS, ["--n_tasks", "3"], None)[0])})
    )
    made = parse(kind, METHODS, ["--config", str(config), "--protocol", "later"], None)[0]
    assert (made.n_epochs, made.batch_size_train, made.n_tasks) == (100, 64, 3)


def test_flags_of_the_other_schedule_are_said_to_do_nothing():
    kind = importlib.import_module("main_pmnist").Hyperparameters
    flags = ["--lr_min", "1e-5", "--lr_patience", "7", "--lr_factor", "3"]
    constant, plateau = (parse(kind, METHODS, [*flags, "--schedule", s], None)[0] for s in ("constant", "plateau"))
    assert unread(plateau, METHODS["gpm"]) == []
    assert unread(constant, METHODS["gpm"]) == [
        f"{name} is read by --schedule plateau alone" for name in ("lr_patience", "lr_factor")
    ]


def test_small_negative_numbers_are_numbers():
    kind = importlib.import_module("main_cifar100").Hyperparameters
    assert parse(kind, METHODS, ["--threshold_step", "-1e-4"], None)[0].threshold_step == -1e-4


@pytest.mark.usefixtures("quick")
def test_a_run_by_the_later_protocol_can_be_repeated(tiny_run, tmp_path):
    summary = tiny_run("main_miniimagenet", tmp_path, "--protocol", "later", "--quiet")
    config = Path(summary["folder"]) / "config.json"
    assert f"/protocol=later,{TINY_VARIANT}" in summary["folder"]
    again = main("main_miniimagenet", "--config", config, "--output_dir", tmp_path / "again", "--quiet")
    assert again["accuracy"] == summary["accuracy"] and again["variant"] == summary["variant"]
    assert [task["name"] for task in summary["tasks"]] == ["classes 0 to 4", "classes 5 to 9"]


def shown(default: object) -> str:
    if isinstance(default, dict):
        return " ".join(f"{key}={value}" for key, value in default.items())
    return " ".join(map(str, default)) if isinstance(default, tuple) else str(default)


@every_script
def test_help_shows_every_flag_with_its_meaning_and_default(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100000")  # no line breaks
    with pytest.raises(SystemExit) as stopped:
        main(name, "--help")
    assert stopped.value.code == 0
    entries = re.split(r"\n  (?=--)", capsys.readouterr().out)  # one a flag
    options = importlib.import_module(name).Hyperparameters
    script = list(dataclasses.fields(options))
    of_methods = [field for method in METHODS.values() for field in dataclasses.fields(with_flags(Options, method))]
    for field in {field.name: field for field in [*of_methods, *script]}.values():
        (entry,) = [entry for entry in entries if re.match(rf"--{field.name}\s", entry)]
        assert field.metadata["help"] in entry
        if field not in script:
            continue
        default = default_of(field)
        if default not in (None, False, {}):
            usual = {m.name: defaults(options, m)[field.name] for m in METHODS.values() if is_read(field, m)}
            own = [
                f"; {key} {shown(value)}" for key, value in usual.items() if value != default and field.name != "method"
            ]
            own += [f"; {key} {own[field.name]}" for key, own in options.by_protocol.items() if field.name in own]
            assert f"(default: {shown(default)}{''.join(own)})" in entry
            assert "ogd 0.001; hat 0.05" in entry or field.name != "lr"


@pytest.fixture
def refused(monkeypatch, capsys, tmp_path):
    """What a script says on stderr before it exits with code 2; it must be one line."""

    def call(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)  # where the run folder would be, if it got so far
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # which `script` replaces
        monkeypatch.setattr(hardware, "flush_denormals", lambda: None)  # which would last
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            script(importlib.import_module(name).main)
        streams = capsys.readouterr()
        assert stopped.value.code == 2
        assert streams.err.startswith(f"{name}.py: error: ")
        assert streams.err.count("\n") == 1
        assert streams.err.endswith("\n")
        assert streams.out == ""
        return streams.err

    return call


def test_denormals_are_zero_in_every_thread():
    """HAT's gates make so many that an epoch of AlexNet took seven times as long."""
    code = "import torch; from engine.cli import script; torch.set_num_threads(2); script(lambda _: product())"
    code = "def product(): sys.exit(int((torch.full((10**6,), 1e-20) * 1e-20).any()))\n" + code
    subprocess.run([sys.executable, "-c", f"import sys\n{code}"], cwd=ROOT, check=True)


def test_large_weights_and_seeds_are_no_counts():
    flags = ["--method", "ewc", "--class_order_seed", "20261128000"]
    options, _ = parse(importlib.import_module("main_cifar100").Hyperparameters, METHODS, flags, None)
    check(dataclasses.replace(options, ewc_lambda=5_000_000_000))  # as somebody writes it into a script
    with pytest.raises(InputError, match="^ewc_lambda is 1000.*…; it must be a number of at most 3.4e[+]38$"):
        check(dataclasses.replace(options, ewc_lambda=10**400))


BAD = {
    "unknown method": ("--method magic", "magic"),
    "unknown data": ("--data imaginary", "imaginary"),
    "unknown protocol": ("--protocol secret", "secret"),
    "unknown device": ("--device abacus", "device 'abacus' is not available here; use one of: auto, cpu"),
    "unknown flag": ("--speed 3", "--speed"),
    "threshold 0": ("--threshold 0", "threshold is 0.0; it must be in (0, 1]"),
    "threshold above 1": ("--threshold 1.01", "threshold is 1.01; it must be in (0, 1]"),
    "threshold below 0": ("--threshold -0.5", "threshold is -0.5; it must be in (0, 1]"),
    "threshold not a number": ("--threshold nan", "threshold is nan; it must be in (0, 1]"),
    "threshold no number": ("--threshold much", "much"),
    "threshold of later tasks below 0": ("--threshold 0.1 --threshold_step -0.2", "is -0.1; it must be positive"),
    "threshold of some layers": ("--threshold 0.9 0.9", "threshold has 2 values; give one, or one for each of the"),
    "no epochs": ("--n_epochs 0", "n_epochs is 0; it must be positive"),
    "more epochs than anybody counts": (
        f"--n_epochs {2**31}",
        "n_epochs is 2147483648; it must be a whole number of at most 2,147,483,647",
    ),
    "negative epochs": ("--n_epochs -3", "n_epochs is -3; it must be positive"),
    "no training batch": ("--batch_size_train 0", "batch_size_train is 0; it must be positive"),
    "negative test batch": ("--batch_size_test -1", "batch_size_test is -1; it must be positive"),
    "no lr": ("--lr 0", "lr is 0.0; it must be positive"),
    "negative lr": ("--lr -0.1", "lr is -0.1; it must be positive"),
    "lr not a number": ("--lr nan", "lr is nan; it must be positive"),
    "momentum": ("--momentum 1", "momentum is 1.0; it must be in [0, 1)"),
    "momentum of Adam": (
        "--method adam_nscl --momentum 0.5",
        "momentum is 0.5, which is of SGD; adam_nscl's steps are",
    ),
    "a conceptor that leaves all": ("--method code_cl --code_mu 1", "code_mu is 1.0; it must be in [0, 0.9999]"),
    "no aperture": ("--method code_cl --code_alpha 1e-170", "code_alpha is 1e-170; it must be 1e-06 or more"),
    "no tasks": ("--n_tasks 0", "n_tasks is 0; it must be positive"),
    "negative seed": ("--seed -1", "seed is -1"),
    "no images": ("--n_train 0", "n_train is 0; it must be positive"),
    "all held out": ("--pc_valid 1", "pc_valid is 1.0; it must be in [0, 1)"),
    "samples of no layer": ("--samples fc77=3", "samples names 'fc77', which is no layer"),
    "samples without count": ("--samples fc1", "fc1"),
    "another method's flag": ("--ewc_lambda 3", "--ewc_lambda is a flag of ewc; this run's is gpm"),
    "a flag that the method does not read": (
        "--threshold 0.9 --method naive",
        "--threshold is a flag of gpm, dual_gpm, sgp,",
    ),
    "an abbreviation": ("--n_ep 3", "--n_ep"),
    "a layer's samples twice": ("--samples fc=1 fc=5", "samples names fc twice; give each layer one count"),
    "samples of all images": ("--n_samples all --samples fc1=3", "n_samples is all, which leaves samples nothing"),
    "lr that ends a task at once": (
        "--schedule plateau --lr 0.0001",
        "lr is 0.0001; it must be lr_min = 0.001 or more",
    ),
}


@pytest.mark.parametrize("case", BAD)
@every_script
def test_bad_input(name, case, refused, data_dir, tmp_path):
    flags, message = BAD[case]
    tiny = [*TINY, *SCRIPTS[name][1], "--data_dir", data_dir, "--output_dir", tmp_path / "runs"]
    assert message in refused(name, *tiny, *flags.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@every_script
def test_no_gpu(name, refused, data_dir):
    assert "device 'cuda' is not available here; use one of: auto, cpu" in refused(name, *TINY, "--device", "cuda")


@pytest.mark.parametrize("name", [name for name, (_, _, most) in SCRIPTS.items() if most])
def test_more_tasks_than_exist(name, refused, data_dir):
    most = SCRIPTS[name][2]
    tiny = [*TINY, "--data_dir", data_dir, "--threshold_step", 0]
    assert f"n_tasks is {most + 1}; it must be 1 to {most}" in refused(name, *tiny, "--n_tasks", most + 1)


@pytest.mark.parametrize(
    ("datasets", "message"),
    [
        (["mnist", "imagenet"], "unknown data set 'imagenet'; known are cifar10, mnist, svhn, fashion_mnist, notmnist"),
        (["mnist", "mnist"], "each once"),
        (["mnist"], "n_tasks is 2; it must be 1 to 1"),
    ],
    ids=["unknown", "twice", "fewer than tasks"],
)
def test_datasets_that_cannot_be_used(datasets, message, refused, data_dir):
    assert message in refused("main_five_datasets", *TINY, "--data_dir", data_dir, "--datasets", *datasets)


@pytest.mark.parametrize("flag", ["batch_size_train", "batch_size_test", "n_samples"])
def test_one_image_at_a_time_where_batch_norm_refuses_it(flag, refused, data_dir, tmp_path):
    tiny = [*TINY, "--data_dir", data_dir, "--output_dir", tmp_path, "--quiet", "--samples", "conv1=1", f"--{flag}", 1]
    assert f"{flag} is 1; it must be 2 or more, since the network cannot take" in refused("main_cifar100", *tiny)


@pytest.mark.parametrize("order", [-1, 5])
def test_task_order_that_was_not_published(order, refused, data_dir):
    tiny = [*TINY, "--data_dir", data_dir, "--t_order", order]
    assert f"t_order is {order}" in refused("main_cifar100_superclass", *tiny)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_outputs", 9], "MLP has 9 outputs for the 10 classes of permutation 0"),
        (["--n_hidden", 0], "n_hidden is 0; it must be positive"),
    ],
    ids=["fewer outputs than digits", "no hidden units"],
)
def test_units_that_make_no_network(flags, message, refused, data_dir, tmp_path):
    tiny = [*TINY, "--data_dir", data_dir, "--output_dir", tmp_path, "--quiet"]
    assert message in refused("main_pmnist", *tiny, *flags)


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_bytes(path: Path) -> None:
    path.write_bytes(b"<html>404</html>")


def other_type(path: Path) -> None:
    np.save(path, np.load(path).astype(np.float32))


def pickled(path: Path) -> None:
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)


@pytest.mark.parametrize("damage", [cut_off, empty, other_bytes, other_type, pickled], ids=lambda f: f.__name__)
@pytest.mark.parametrize("file", ["train_images.npy", "test_labels.npy"])
@pytest.mark.parametrize("data", ["real", "embedded"])
def test_corrupt_cache(data, file, damage, refused, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(embedded.RECIPES, "mnist", embedded.RECIPES["mnist"]._replace(n_train=2, n_test=2))
        embedded.load_raw("mnist", tmp_path)
    (folder,) = (tmp_path / "embedded").glob("mnist*")
    if data == "real":
        folder = folder.rename(tmp_path / "mnist")
    damage(folder / file)
    error = refused("main_pmnist", *TINY, "--data", data, "--data_dir", tmp_path, "--output_dir", tmp_path / "runs")
    assert f"{folder / file} " in error
    assert "delete this file" in error


@every_script
def test_output_folder_that_cannot_be_written(name, refused, data_dir, tmp_path):
    (tmp_path / "file").write_text("")
    tiny = [*TINY, *SCRIPTS[name][1], "--data_dir", data_dir, "--output_dir", tmp_path / "file"]
    error = refused(name, *tiny)
    assert f"cannot write to {tmp_path / 'file'}" in error
    assert "choose another folder" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [("--method magic", "magic"), ("--lr 0", "lr is 0.0; it must be positive")],
    ids=["by argparse", "by the engine"],
)
def test_bad_input_of_a_process(flags, message, tmp_path):
    command = [sys.executable, ROOT / "main_pmnist.py", *flags.split(), "--output_dir", tmp_path]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1
    assert process.stderr.startswith("main_pmnist.py: error: ")
    assert message in process.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real
def test_permuted_mnist_on_the_real_images(tmp_path):
    folder = Path(os.environ.get("GPM_DATA_DIR", ROOT / "data"))
    if not (folder / "mnist" / "train_images.npy").exists():
        pytest.skip(f"no images in {folder / 'mnist'}")
    flags = ["--n_tasks", 2, "--n_train", 100, "--n_epochs", 2, "--device", "cpu", "--quiet"]
    summary = main("main_pmnist", *flags, "--data_dir", folder, "--output_dir", tmp_path)
    assert summary["data"]["kind"] == "real"
    assert summary["data"]["sources"]["mnist"]["verified"]
    assert min(value for row in summary["accuracy"] for value in row if value is not None) > 60
