"""The command line under random flags: a run, or one line and exit code 2; never a traceback."""

import copy
import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import main_cifar100
import main_cifar100_superclass
import main_five_datasets
import main_miniimagenet
import main_pmnist
from dataloader.embedded import render as embedded
from engine.cli import parse
from engine.options import default_of
from gradproj.errors import DivergenceError, InputError
from methods import METHODS
from tests.faults import COUNTS

SCRIPTS = (main_pmnist, main_cifar100, main_cifar100_superclass, main_five_datasets, main_miniimagenet)
JUNK = [
    *("", " ", "-", "--", "0", "-0", "1", "2", "-1", "3.5", "1e400", "-1e400", "nan", "inf", "-inf", "1e-320", "1_0"),
    *("9" * 18, "9" * 40, "9" * 400, "0x10", "٣", "½", "all", "ALL", "none", "None", "true", "=", "fc1=", "=3"),
    *("fc1=3", "fc1=-3", "fc1=0", "fc=9", "fc1=" + "9" * 30, "a=1=2", "..", "../..", "/", "~", "%s", "%(prog)s", "{}"),
    *("[]", "é🎲\u202e", "gpm", "naive", "cuda", "cpu", "cuda:99", "cpu:0", "meta", "mps", "bf16", "task", "plateau"),
    *("--lr", "@file"),
]
FEW = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
value = st.one_of(st.sampled_from(JUNK), text, st.integers().map(str), st.floats().map(str))


def flags_of(script) -> dict[str, dataclasses.Field]:
    """All flags by name, those of every method too."""
    own = {field.name: field for field in dataclasses.fields(script.Hyperparameters)}
    return own | {name: field for method in METHODS.values() for name, field in method.flags.items()}


@st.composite
def command_lines(draw, script):
    """Some of a script's flags, each with values of its own kind or junk, and some that it does not have."""
    names = [*flags_of(script), "config", "help", "no_such_flag"]
    line = []
    for name in draw(st.lists(st.sampled_from(names), max_size=4)):
        values = draw(st.lists(value, max_size=3))
        joined = draw(st.booleans()) and values
        line += [f"--{name}={values[0]}"] if joined else [f"--{name}", *values]
    return draw(st.lists(value, max_size=1)) + line if draw(st.integers(0, 9)) == 0 else line


def refused_or(work, *others):
    """The result of some work; None where it was refused as it should be."""
    try:
        result = work()
    except SystemExit as end:
        assert end.code in (0, 2)  # noqa: PT017
    except (InputError, *others) as error:
        assert str(error)
        assert "\n" not in str(error)  # noqa: PT017
    else:
        return result
    COUNTS["bad inputs refused"] += 1
    return None


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_parsing_gives_options_or_one_line(script, capsys):
    @settings(FEW, max_examples=250)
    @given(command_lines(script))
    def check(line):
        COUNTS["command lines tried"] += 1
        parsed = refused_or(lambda: parse(script.Hyperparameters, METHODS, line, ""))
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) <= 1
        if parsed is not None:
            for field in dataclasses.fields(parsed[0]):
                found, default = getattr(parsed[0], field.name), default_of(field)
                if default is not None and field.name != "n_samples":
                    assert isinstance(found, type(default))

    check()


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), text, st.sampled_from(JUNK)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(text, inner, max_size=3)),
    max_leaves=4,
)


def test_config_of_odd_values_gives_options_or_one_line(tmp_path, capsys):
    path = tmp_path / "config.json"
    names = [field.name for field in dataclasses.fields(main_pmnist.Hyperparameters)]

    @settings(FEW, max_examples=250)
    @given(
        st.dictionaries(st.sampled_from(names), json_values, min_size=1, max_size=2), st.integers(0, 30), json_values
    )
    def check(changes, kind, whole):
        COUNTS["command lines tried"] += 1
        config = {"hyperparameters": vars(main_pmnist.Hyperparameters()) | changes}
        config = {0: whole, 1: {"hyperparameters": whole}}.get(kind, config)
        path.write_text(json.dumps(config))
        refused_or(lambda: parse(main_pmnist.Hyperparameters, METHODS, ["--config", str(path)], ""))
        assert len(capsys.readouterr().err.splitlines()) <= 1

    check()


@pytest.mark.parametrize("content", [b"", b"\xff", b"{", b"null", b"[" * 100_000, b'{"hyperparameters": ["lr"]}'])
def test_damaged_config_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config.json is not the config.json of a run|of another script"):
        parse(main_pmnist.Hyperparameters, METHODS, ["--config", str(tmp_path / "config.json")], "")
    COUNTS["damaged files"] += 1


# Numbers that a run of a second can take, beside those that none can.
SMALL = {
    "n_tasks": [-1, 0, 1, 2],
    "n_epochs": [-1, 0, 1, 2],
    "n_hidden": [-5, 0, 1, 3, 20],
    "n_outputs": [-1, 0, 1, 9, 10, 12],
    "memory_images": [-1, 0, 1, 5, 10**12],
    "replay_batch": [-1, 0, 1, 5, 10**12],
    "ogd_samples": [-1, 0, 1, 5],
}
ANY_INTEGER = [-1, 0, 1, 2, 3, 7, 10**6, 2**31, 2**63, 10**30]
ANY_NUMBER = [-1, 0, 1e-320, 1e-8, 0.1, 0.5, 0.999, 1, 1.5, 3, 1e10, 1e300, "nan", "inf"]


@st.composite
def small_runs(draw):
    line = []
    fields = flags_of(main_pmnist)
    left_out = {"data", "data_dir", "output_dir", "run_folder", "device", "quiet", "tensorboard"}
    for name in draw(st.lists(st.sampled_from(sorted(fields.keys() - left_out)), min_size=1, max_size=5, unique=True)):
        default = default_of(fields[name])
        choices = fields[name].metadata["parser"].get("choices")
        if isinstance(default, bool):
            values = []
        elif name == "method":
            values = [draw(st.sampled_from(list(METHODS)))]
        elif isinstance(default, dict):
            values = [
                f"{draw(st.sampled_from(['fc1', 'fc2', 'fc', 'heads']))}={draw(st.sampled_from([0, 1, 5, 10**9]))}"
            ]
        elif isinstance(default, str) or choices:
            values = [draw(st.sampled_from(CHOICES[name]))]
        elif isinstance(default, tuple):
            values = draw(st.lists(st.sampled_from(ANY_NUMBER), min_size=1, max_size=3))
        elif isinstance(default, float):
            values = [draw(st.sampled_from(ANY_NUMBER))]
        else:
            values = [draw(st.sampled_from(SMALL.get(name, ANY_INTEGER)))]
        line += [f"--{name}", *map(str, values)]
    return line


CHOICES = {
    "fs_order": [1, 2],
    "keep": ["last", "each", "all"],
    "protocol": ["paper", "released"],
    "schedule": ["plateau", "constant"],
    "step": ["auto", "eager"],
    "amp": ["off", "bf16"],
    "batchnorm": ["batch", "task"],
}


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
@pytest.mark.filterwarnings("default")  # a script shows them in one line
def test_small_runs_end_well_or_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(embedded.RECIPES, "mnist", embedded.RECIPES["mnist"]._replace(n_train=4, n_test=2))
    base = ["--data", "embedded", "--n_tasks", "2", "--n_epochs", "1", "--n_hidden", "8", "--n_samples", "9"]
    base += ["--device", "cpu", "--quiet", "--data_dir", str(tmp_path / "data"), "--no_resume"]

    @settings(FEW, max_examples=120)
    @given(small_runs())
    def check(line):
        COUNTS["command lines tried"] += 1
        folder = ["--run_folder", str(tmp_path / "run")]
        summary = refused_or(lambda: main_pmnist.main([*base, *folder, *line]), DivergenceError)
        if summary is not None:
            assert summary["finished"]
            assert all(0 <= value <= 100 for value in summary["accuracy"][-1])

    check()


def test_options_are_not_shared_between_command_lines():
    first, _ = parse(main_cifar100.Hyperparameters, METHODS, [], "")
    before = copy.deepcopy(first)
    parse(main_cifar100.Hyperparameters, METHODS, ["--samples", "conv1=3"], "")[0].samples["x"] = 1
    assert parse(main_cifar100.Hyperparameters, METHODS, [], "")[0] == before == first


@pytest.mark.parametrize("value", [["a"], {"a": 1}, 5])
def test_a_text_that_is_none_is_no_folder_of_that_name(tmp_path, value):
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"hyperparameters": {"output_dir": value}}))
    with pytest.raises(InputError, match=r"config.json: output_dir is .*; it must be text, such as 'runs'$"):
        parse(main_pmnist.Hyperparameters, METHODS, ["--config", str(config)], "")
