"""`python -m report`: what it finds, prints and refuses."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest

from gradproj.errors import InputError
from report import __main__ as report
from report import runs as summaries
from report import tables
from tests.report.written import rows_of, summary, write


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"finished": true}',
        json.dumps(summary(average_accuracy=math.nan)),
        json.dumps(summary(seed="1")),
        json.dumps(summary(class_incremental=[["much"]])),
        json.dumps(summary(valid_accuracy=5)),
        json.dumps(summary(hyperparameters=[1])),
        json.dumps(summary(tasks="digits")),
        json.dumps(summary(place="first")),
        json.dumps(summary(tasks=[{"name": 1}])),
        json.dumps(summary(memory_columns={"conv1": ["3"]})),
        json.dumps(summary(memory_input_sizes={"fc1": 48})),  # not that of conv1, which has columns
        json.dumps(summary(memory_input_sizes={"conv1": -48})),
        json.dumps(summary(interference={"conv1": {"ratio": 0.1, "counts": [1, 2]}})),
        json.dumps(summary(interference={"conv1": {"ratio": None, "counts": [0] * 101}})),
        json.dumps(summary(interference={"conv1": 0.1})),
        json.dumps(summary(memory_columns=5)),
        json.dumps(summary(memory_input_sizes={"conv1": 0})),
        json.dumps(summary(class_incremental=[[50.0]])),  # of one task, where the accuracy is of two
        json.dumps(summary(seconds={"total": 1.0, "train": "x"})),
        json.dumps(summary(memory_floats=10**400)),
        json.dumps(summary(accuracy=[[10**400]])),
        json.dumps(summary(backward_transfer=1e300)),
        json.dumps(summary(network={"fingerprint": ["a"]})),
        json.dumps(summary(network="MLP")),
        json.dumps(summary(epochs=[2.5])),
        json.dumps(summary(title="GPM")),  # without saying whether it uses the task's identity
        json.dumps(summary(data={"kind": "real", "sources": {"cifar100": None}})),
        json.dumps(summary(valid_accuracy=[[]])),
        json.dumps(summary(accuracy=[[90.0], [80.0]])),
        json.dumps(summary(accuracy=[[90.0, None], [80.0]])),
        json.dumps(summary(accuracy=[[90.0, None, None], [80.0, 80.0, None]])),
        json.dumps(summary(tasks=[{"name": "a"}])),  # where the accuracy is of two
        json.dumps({name: value for name, value in summary().items() if name != "backward_transfer"}),
    ],
)
def test_damaged_runs_are_listed(tmp_path, content, capsys):
    write(tmp_path / "good")
    (write(tmp_path / "bad") / "summary.json").write_text(content)
    for form in tables.FORMATS:
        assert report.main([str(tmp_path), "--format", form]) == 0
        out = capsys.readouterr().out
        assert "damaged" in out and str(tmp_path / "bad") in out.replace("\\_", "_")


def test_unfinished_runs_are_listed_with_their_position(tmp_path, capsys):
    folder = write(tmp_path / "half")
    (folder / "summary.json").unlink()
    (folder / "epochs.jsonl").write_text('{"task": 0, "epoch": 7}\n')
    assert report.main([str(tmp_path)]) == 0
    assert f"unfinished: {folder} (begun: task 1/2, epoch 7" in capsys.readouterr().out
    (folder / "epochs.jsonl").write_text('{"task": 1, "epoch": 1}\n{"task": 1, "epoch": 2}\n')  # learned together
    assert report.main([str(tmp_path)]) == 0
    assert f"unfinished: {folder} (begun: epoch 2;" in capsys.readouterr().out


def test_diverged_runs_are_listed_with_where(tmp_path, capsys):
    folder = write(tmp_path / "wild")
    (folder / "divergence.txt").write_text("the loss is no longer finite: task 2\n")
    assert report.main([str(tmp_path)]) == 0  # finished since, as its summary says
    assert "diverged" not in capsys.readouterr().out
    (folder / "summary.json").unlink()
    assert report.main([str(tmp_path)]) == 0
    assert f"diverged: {folder} (the loss is no longer finite: task 2)" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["absent", "."])
def test_bad_input_is_one_line(tmp_path, path, capsys):
    assert report.main([str(tmp_path / path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and str(tmp_path) in captured.err


def test_formats_parse(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", method="naive", variant="n_epochs=20")
    rows = rows_of(tmp_path)
    lines = list(csv.DictReader(io.StringIO(tables.as_csv(rows, []))))
    assert [line["method"] for line in lines] == ["gpm", "naive"]
    assert [float(line["average_accuracy"]) for line in lines] == [80.0, 80.0]
    assert lines[1]["command"] == "python main_cifar100.py --method naive --n_epochs 20 --seed 1"
    table = [line for line in tables.as_markdown(rows, []).splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    latex = tables.as_latex(rows, []).split("\\midrule")[1].split("\\bottomrule")[0]
    n_columns = tables.as_latex(rows, []).split("{tabular}{")[1].index("}")
    assert all(line.count(" & ") == n_columns - 1 for line in latex.strip().splitlines())
    assert "n\\_epochs=20" in latex


def test_signs_in_latex(tmp_path):
    assert tables._latex("|a - b| <= 1") == "$|$a - b$|$ $<$= 1"


def test_the_command_of_several_seeds_is_one_sweep(tmp_path):
    for seed in (1, 2):
        write(tmp_path / str(seed), seed=seed, method="naive", variant="n_epochs=20")
    (row,) = rows_of(tmp_path)
    expected = "bash run_experiments.sh paper --only cifar100 --methods naive --seeds 1 2 --n_epochs 20"
    assert tables.command(row) == expected


def test_a_search_shows_the_validation_accuracy(tmp_path, capsys):
    write(tmp_path / "x", valid_accuracy=[[91.0, None], [82.0, 81.0]], hyperparameters={"lr": 0.1})
    for flags, shown in (["--against", "lr"], True), ([], False), (["--format", "csv"], True):
        assert report.main([str(tmp_path), *flags]) == 0
        assert ("81.5" in capsys.readouterr().out) == shown


def test_a_search_over_nothing_that_is_there(tmp_path, capsys):
    write(tmp_path / "x")
    assert report.main([str(tmp_path), "--against", "treshold"]) == 2
    said = capsys.readouterr()
    assert said.err == "report: error: --against treshold: none of these runs has such a hyperparameter\n"
    assert not said.out


def test_the_command_of_a_method_of_ones_own_is_not_known(tmp_path):
    (row,) = rows_of(write(tmp_path / "x", method="mine"))
    assert tables.command(row) == "–"


def test_find_runs_takes_single_files_and_folders(tmp_path):
    folder = write(tmp_path / "x/y/seed-1")
    for path in (folder, folder / "summary.json", tmp_path):
        runs, problems = summaries.find_runs([path])
        assert [run.path for run in runs] == [folder] and not problems
    with pytest.raises(InputError, match="does not exist"):
        summaries.find_runs([tmp_path / "nothing"])


def test_of_a_seed_that_is_there_twice_the_one_in_the_table_is_collected(tmp_path, capsys):
    write(tmp_path / "runs/a")
    write(tmp_path / "runs/b", average_accuracy=99.5, accuracy=[[99.0, None], [99.0, 100.0]])
    assert report.main([str(tmp_path / "runs"), "--collect", str(tmp_path / "results")]) == 0
    assert "left out" in capsys.readouterr().out
    (file,) = (tmp_path / "results").rglob("*.json")
    assert json.loads(file.read_text())["average_accuracy"] == 80.0


def test_runs_that_would_be_one_file_are_not_collected(tmp_path, capsys):
    for name, lr in (("a", 0.01), ("b", 1.0)):
        write(tmp_path / "runs" / name, hyperparameters={"lr": lr})
    assert report.main([str(tmp_path / "runs"), "--collect", str(tmp_path / "results")]) == 2
    assert "collect one of them" in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("name", "code"), [("damaged", 1), ("absent", 1), ("good", 0)])
def test_the_exit_code_says_whether_there_are_numbers(tmp_path, name, code):
    write(tmp_path / "good")
    (write(tmp_path / "damaged") / "summary.json").write_text("{")
    assert report.main([str(tmp_path / name), *([str(tmp_path / "good")] if name == "absent" else [])]) == code


def test_a_folder_for_the_html_report(tmp_path, capsys):
    assert report.main([str(write(tmp_path / "a")), "--html", str(tmp_path)]) == 2
    assert "is a folder; give a file such as" in capsys.readouterr().err
