"""The table over run folders, the pictures, and the README's table."""

from __future__ import annotations

import csv
import io
import json
import math
import re

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from gradproj.errors import InputError
from report import __main__ as report
from report import pages, tables
from report import rows as comparison
from report import runs as summaries
from report.plots import draw as figures
from report.plots.accuracy import accuracy_heat_map, accuracy_over_time, mean_matrix
from report.plots.draw import draw_pictures
from report.plots.memory import mean_columns, memory_growth
from report.plots.style import save
from report.published import PUBLISHED, Estimate, reproduced
from tests import ROOT


def summary(**changes):
    """The summary of a two-task run on complete real data: ACC 80, BWT -10."""
    return {
        "benchmark": "cifar100",
        "method": "gpm",
        "variant": "default",
        "seed": 1,
        "protocol": "paper",
        "data": {"kind": "real", "sources": {"cifar100": {"train_sha256": "a", "verified": True}}, "notes": []},
        "average_accuracy": 80.0,
        "backward_transfer": -10.0,
        "accuracy": [[90.0, None], [80.0, 80.0]],
        "memory_columns": {"conv1": [3, 5]},
        "memory_input_sizes": {"conv1": 48},
        "seconds": {"total": 60.0},
        "hyperparameters": {"n_epochs": 20, "data_dir": "/home/me/data", "output_dir": "/home/me/runs", "quiet": True},
        "device": "Intel(R) Xeon(R) Processor, 1 thread(s)",
        "finished": True,
    } | changes


def write(folder, **changes):
    """A run folder; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hyperparameters": {"n_tasks": 2}}')
    (folder / "summary.json").write_text(json.dumps(summary(**changes)))
    return folder


def rows_of(*paths):
    runs, _ = summaries.find_runs(paths)
    return comparison.summarise(runs)


def test_estimate_is_the_mean_and_the_deviation_over_n_minus_1():
    # Deviations -1, 0, 1 from the mean 72: variance 2 / (3 - 1) = 1.
    assert comparison.estimate([71.0, 72.0, 73.0]) == Estimate(72.0, 1.0, 3)
    assert comparison.estimate([71.5]) == Estimate(71.5, None, 1)


@pytest.mark.parametrize(
    ("ours", "answer"),
    [
        (Estimate(73.0, None, 1), True),  # 1.0 away: the least tolerance
        (Estimate(73.01, None, 1), False),
        (Estimate(73.9, 2.0, 4), True),  # 2 sqrt(4/4 + 0) = 2
        (Estimate(74.1, 2.0, 4), False),
        (Estimate(74.0, 2.0, 4), True),
    ],
)
def test_reproduced_by_hand(ours, answer):
    assert reproduced(ours, Estimate(72.0, 0.0, 5)) is answer


def test_both_spreads_widen_the_tolerance():
    # 2 sqrt(3^2/9 + 4^2/4) = 2 sqrt 5 = 4.47
    assert reproduced(Estimate(74.4, 3.0, 9), Estimate(70.0, 4.0, 4))
    assert not reproduced(Estimate(74.5, 3.0, 9), Estimate(70.0, 4.0, 4))


def test_a_row_of_three_seeds(tmp_path):
    for seed, accuracy in ((1, 71.0), (2, 72.0), (3, 73.0)):
        write(tmp_path / f"seed-{seed}", seed=seed, average_accuracy=accuracy, backward_transfer=-0.5)
    (row,) = rows_of(tmp_path)
    assert row.accuracy == Estimate(72.0, 1.0, 3)
    assert row.backward_transfer == Estimate(-0.5, 0.0, 3)
    assert row.seeds == [1, 2, 3]
    assert row.verdict == "yes"  # 72.48 and -0.9
    text = tables.as_text([row], [])
    assert "72.00 ± 1.00" in text and "72.48 ± 0.40" in text and "Xeon Processor, 1 thread." in text


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({"average_accuracy": 72.0, "backward_transfer": -1.0}, "yes"),
        ({"average_accuracy": 60.0, "backward_transfer": -1.0}, "no (ACC below)"),
        ({"average_accuracy": 72.0, "backward_transfer": -5.0}, "no (BWT below)"),
        ({}, "no (ACC above and BWT below)"),
        ({"variant": "n_epochs=20"}, "not comparable: variant"),
        ({"data": {"kind": "real", "notes": ["cifar100: 25,000 of 50,000 training images"]}}, "not comparable: data"),
        ({"data": {"kind": "embedded", "notes": []}}, "embedded data"),
        ({"method": "naive"}, "nothing published"),
        ({"method": "multitask", "average_accuracy": 79.0, "backward_transfer": None}, "yes"),
        ({"benchmark": "cifar100_superclass", "average_accuracy": 57.0, "backward_transfer": -1.0}, "yes"),
        (
            {"benchmark": "cifar100_superclass", "variant": "protocol=released"},
            "no (ACC above and BWT below)",
        ),
    ],
)
def test_verdicts(tmp_path, changes, verdict):
    (row,) = rows_of(write(tmp_path / "run", **changes))
    assert row.verdict.startswith(verdict)


def test_embedded_rows_never_stand_beside_a_papers_number(tmp_path):
    write(tmp_path / "a", data={"kind": "embedded", "notes": []})
    write(tmp_path / "b")
    real, embedded = rows_of(tmp_path)
    assert (real.data, embedded.data) == ("real", "embedded")
    assert real.published == PUBLISHED["cifar100", "gpm"] and embedded.published is None
    line = next(line for line in tables.as_text([real, embedded], []).splitlines() if " embedded " in line)
    assert "72.48" not in line


def test_notes_are_numbered_under_the_table_and_keep_rows_apart(tmp_path):
    note = "cifar100: 25,000 of 50,000 training images"
    write(tmp_path / "a")
    write(tmp_path / "b", seed=2, data={"kind": "real", "notes": [note]})
    rows = rows_of(tmp_path)
    assert len(rows) == 2
    text = tables.as_text(rows, [])
    assert f"[1] {note}" in text and "GPM [1]" in text


def test_null_backward_transfer_is_a_dash(tmp_path):
    rows = rows_of(write(tmp_path / "run", method="multitask", backward_transfer=None))
    (line,) = csv.DictReader(io.StringIO(tables.as_csv(rows, [])))
    assert line["backward_transfer"] == ""
    assert tables.table(rows)[0][0]["BWT"] == "–"


def test_the_same_seed_twice_counts_once(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    (row,) = rows_of(tmp_path)
    assert row.seeds == [1] and not row.notes
    write(tmp_path / "c", accuracy=[[91.0, None], [80.0, 80.0]])
    (row,) = rows_of(tmp_path)
    assert row.seeds == [1] and "seed 1 is there twice with different numbers" in row.notes[0]


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
        json.dumps(summary(title="GPM")),  # without saying whether it uses the task's identity
        json.dumps(summary(data={"kind": "real", "sources": {"cifar100": None}})),
        json.dumps(summary(valid_accuracy=[[]])),
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


def test_the_command_of_several_seeds_is_one_sweep(tmp_path):
    for seed in (1, 2):
        write(tmp_path / str(seed), seed=seed, method="naive", variant="n_epochs=20")
    (row,) = rows_of(tmp_path)
    expected = "bash run_experiments.sh paper --only cifar100 --methods naive --seeds 1 2 --n_epochs 20"
    assert tables.command(row) == expected


def test_plots_are_written_as_png_and_pdf(tmp_path, capsys):
    write(tmp_path / "runs/a")
    write(tmp_path / "runs/b", seed=2, accuracy=[[80.0, None], [70.0, 60.0]])
    write(tmp_path / "runs/c", method="multitask", backward_transfer=None, accuracy=[[None, None], [90.0, 90.0]])
    assert report.main([str(tmp_path / "runs"), "--plots", str(tmp_path / "figures")]) == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    stem = "real-cifar100-default"
    parts = ("accuracy_over_time", "methods", "gpm-accuracy", "gpm-memory", "multitask-accuracy")
    assert {f"{stem}-{part}.{kind}" for part in parts for kind in ("png", "pdf")} <= names
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG" if path.suffix == ".png" else b"%PDF")
    assert str(tmp_path / "figures" / f"{stem}-methods.png") in capsys.readouterr().err


def test_pictures_mark_methods_that_are_told_the_task(tmp_path):
    rows = rows_of(write(tmp_path / "a"), write(tmp_path / "b", method="hat", title="HAT", task_identity=True))
    figures = {}
    draw_pictures(rows, lambda figure, name: figures.update({name: figure}))
    for name in ("accuracy_over_time", "methods"):
        figure = figures[f"real-cifar100-default-{name}"]
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert "GPM" in texts and "HAT ‡" in texts and "HAT" not in texts
        assert any("‡ is told which task an image is of" in text for text in texts)
    assert "real-cifar100-default-hat-accuracy" in figures


def with_costs(**changes):
    """What a summary needs for the pictures of costs and interference."""
    counts = [0] * 50 + [7] + [0] * 50
    found = {"interference": {"conv1": {"ratio": 0.01, "counts": counts}}, "epochs": [2, 3], "memory_floats": 576}
    return found | {"seconds": {"total": 60.0, "train": 50.0}} | changes


def test_costs_and_interference_are_drawn_where_they_are_known(tmp_path):
    write(tmp_path / "runs/a", **with_costs())
    write(tmp_path / "runs/b", **with_costs(method="naive", memory_floats=0, memory_input_sizes={}, memory_columns={}))
    assert report.main([str(tmp_path / "runs"), "--plots", str(tmp_path / "figures")]) == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert {"real-cifar100-default-costs.pdf", "real-cifar100-default-interference.pdf"} <= names


def test_costs_are_relative_to_the_largest_memory_and_per_epoch(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "bars", lambda scores, *rest, **more: drawn.append(scores) or Figure())
    write(tmp_path / "a", **with_costs())
    write(tmp_path / "b", **with_costs(method="naive", memory_floats=0, memory_input_sizes={}, memory_columns={}))
    figures.draw(rows_of(tmp_path), tmp_path / "figures")
    # 576 floats of 48 x 48 possible ones; 50 s over 2 + 3 epochs.
    gpm, naive = ((Estimate(share, None, 1), Estimate(10.0, None, 1)) for share in (25.0, 0.0))
    assert drawn[1] == {"GPM": gpm, "naive": naive}


def test_a_sweep_is_drawn_over_its_hyperparameter(tmp_path, capsys):
    for value in (0.99, 0.9):
        changes = with_costs(variant=f"n_epochs=20,threshold={value}")
        write(tmp_path / f"runs/{value}", **changes, hyperparameters={"threshold": [value]})
    arguments = [str(tmp_path / "runs"), "--plots", str(tmp_path / "figures"), "--against"]
    assert report.main([*arguments, "threshold"]) == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    stem = "real-cifar100-n_epochs-20-gpm-threshold"
    assert {f"{stem}-sweep.png", f"{stem}-interference.png"} <= {name.replace("=", "-") for name in names}
    capsys.readouterr()
    assert report.main([*arguments, "lr"]) == 2
    assert capsys.readouterr().err == (
        "report: error: no two of these runs differ in lr alone, so nothing can be drawn over it\n"
    )


@pytest.mark.parametrize(("n_tasks", "n_layers"), [(1, 1), (20, 20)])
def test_pictures_of_extreme_sizes(tmp_path, n_tasks, n_layers):
    accuracy = [[float(j) if j <= i else None for j in range(n_tasks)] for i in range(n_tasks)]
    layers = [f"layer{i}" for i in range(n_layers)]
    save(accuracy_heat_map(accuracy, "accuracy"), tmp_path / "a.png")
    growth = memory_growth(dict.fromkeys(layers, [1] * n_tasks), dict.fromkeys(layers, 2), "memory")
    save(growth, tmp_path / "b.png")
    save(accuracy_over_time({"gpm": [accuracy], "mine": [accuracy]}, "time"), tmp_path / "c.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 0 for name in "abc")


def test_mean_matrix_and_columns_by_hand():
    assert mean_matrix([[[90.0, None], [80.0, 60.0]], [[70.0, None], [60.0, 50.0]]]) == [[80, None], [70, 55]]
    assert mean_columns([{"fc1": [2, 4]}, {"fc1": [4, 4]}]) == {"fc1": [3.0, 4.0]}


def test_collect_then_readme(tmp_path, capsys):
    write(tmp_path / "runs/a", variant="n_epochs=20")
    results, readme = tmp_path / "results", tmp_path / "README.md"
    assert report.main([str(tmp_path / "runs"), "--collect", str(results)]) == 0
    copy = results / "real/cifar100/gpm/n_epochs=20/seed-1.json"
    assert json.loads(copy.read_text())["hyperparameters"] == {"n_epochs": 20}  # nothing of the machine's folders
    readme.write_text(f"before\n{pages.BEGIN}\nold\n{pages.END}\nafter\n")
    assert report.main([str(results), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "| 80.00 |" in text
    assert report.main([str(results), "--readme", str(readme)]) == 0
    assert readme.read_text() == text
    capsys.readouterr()
    readme.write_text("no markers")
    assert report.main([str(results), "--readme", str(readme)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("page", "kind"),
    [("README.md", "readme"), ("docs/results.md", "page"), ("docs/successors.md", "successors")],
)
def test_the_pages_tables_are_what_the_results_say(page, kind):
    parts = pages.split_page((ROOT / page).read_text(encoding="utf-8"))
    runs, problems = summaries.find_runs([ROOT / "results" / "real"])
    assert not problems
    expected = pages.block(pages.PAGES[kind](comparison.summarise(runs), problems))
    assert parts[1] == expected, f"run: python -m report results/real --{kind} {page}"


def test_successors_stand_beside_gpm_with_source_and_costs(tmp_path):
    write(
        tmp_path / "a",
        method="trgp",
        title="TRGP",
        place=3,
        task_identity=True,
        variant="n_epochs=20",
        memory_floats=1_234_567,
    )
    write(tmp_path / "b", variant="n_epochs=20", memory_floats=1)
    write(tmp_path / "c", variant="n_epochs=10", memory_floats=2)
    write(tmp_path / "d", method="ewc", variant="n_epochs=20")
    write(tmp_path / "e", method="naive", benchmark="pmnist", memory_floats=0)
    write(
        tmp_path / "f",
        method="dfgp",
        title="DFGP",
        place=1,
        task_identity=False,
        average_accuracy=74.0,
        backward_transfer=-1.0,
        memory_floats=3,
    )
    write(tmp_path / "g", method="fs_dgpm", title="FS-DGPM", place=2, task_identity=False, memory_floats=4)
    write(tmp_path / "h", method="sgp", memory_floats=5, data={"kind": "embedded", "notes": []})
    lines = [line.strip("| ").split(" | ") for line in pages.successor_tables(rows_of(tmp_path), []).splitlines()]
    assert lines[0] == ["## 10-split CIFAR-100"] and not any("permuted" in line[0] for line in lines)
    assert [(line[0], line[1]) for line in lines if len(line) > 2][2:] == [
        ("DFGP", "default"),
        ("FS-DGPM", "default"),
        ("GPM", "n_epochs=20"),
        ("TRGP ‡", "n_epochs=20"),
    ]
    dfgp, fs_dgpm, _, trgp = [line for line in lines if len(line) > 2][2:]
    assert dfgp[4:9] == ["74.59", "-0.85", "authors' logs", "yes", "3"]
    assert fs_dgpm[7] == "not comparable: published under another protocol"
    assert trgp[7:] == ["not comparable: variant", "1,234,567", "60 s", "seed 1"]


def test_the_short_table_has_what_is_compared_and_gpm_and_naive(tmp_path):
    write(tmp_path / "a", variant="n_epochs=20", average_accuracy=70.0)
    write(tmp_path / "b", average_accuracy=71.0)
    write(tmp_path / "c", method="ewc", variant="n_epochs=10", average_accuracy=61.0)
    write(tmp_path / "d", method="owm", average_accuracy=62.0)
    for name, seconds in (("e", 60.0), ("f", 99.0)):
        changes = {"variant": f"n_epochs={seconds}", "average_accuracy": seconds, "seconds": {"total": seconds}}
        write(tmp_path / name, method="naive", **changes)
    write(tmp_path / "g", method="naive", benchmark="pmnist", data={"kind": "embedded", "notes": []})
    text = pages.short_table(rows_of(tmp_path), [])
    assert [line.split(" | ")[3] for line in text.splitlines() if line.startswith("| 10-split")] == [
        *("62.00", "71.00", "99.00")
    ]
    assert "python main" not in text and "commit" not in text and "embedded" not in text


def test_the_page_has_every_row_with_its_origin(tmp_path):
    write(tmp_path / "a", variant="n_epochs=20", average_accuracy=70.0, seconds={"total": 3600.4}, commit="abc")
    write(tmp_path / "b", average_accuracy=71.0, device="other")
    write(tmp_path / "c", benchmark="pmnist", data={"kind": "real", "notes": ["mnist: 3 of 4 images"]})
    text = pages.all_tables(rows_of(tmp_path), [])
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## permuted MNIST",
        "## 10-split CIFAR-100",
    ]
    (line,) = [line for line in text.splitlines() if line.startswith("| n_epochs=20 |")]
    for cell in ("| 3,600 |", "| Intel Xeon Processor, 1 thread |", "| abc |", "main_cifar100.py", "| seed 1 |"):
        assert cell in line
    assert "| GPM [1] |" in text


def test_forward_transfer_is_against_the_network_of_the_same_seed(tmp_path):
    for seed, alone in ((1, 70.0), (2, 72.0)):
        matrix = [[90.0, None], [90.0, alone]]
        write(tmp_path / f"single-{seed}", method="single", seed=seed, accuracy=matrix, backward_transfer=0.0)
        write(tmp_path / f"gpm-{seed}", seed=seed, accuracy=[[90.0, None], [80.0, 75.0]])
    write(tmp_path / "joint", method="multitask", accuracy=[[None, None], [90.0, 80.0]], backward_transfer=None)
    found = {row.method: row.forward_transfer for row in rows_of(tmp_path)}
    assert found["gpm"] == comparison.estimate([5.0, 3.0])
    assert found["single"] is None and found["multitask"] is None
    assert "+4.00 ± 1.41" in tables.as_text(rows_of(tmp_path), [])
    assert "FWT" not in tables.as_text(rows_of(tmp_path / "gpm-1"), [])


def test_methods_that_know_the_task_at_test_are_marked(tmp_path):
    rows = rows_of(write(tmp_path / "a", method="hat"), write(tmp_path / "b"))
    for form, mark in (("text", "HAT ‡"), ("markdown", "HAT ‡"), ("latex", r"HAT $\ddagger$")):
        assert mark in tables.FORMATS[form](rows, [])
    assert "GPM ‡" not in tables.as_text(rows, [])


@pytest.mark.parametrize("page", ["baselines.md", "successors.md"])
def test_the_search_over_hyperparameters_is_what_the_results_say(page):
    page = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| `(results/\S+)` \| ([\d.]+) \| ([\d.]+) \| ([-+][\d.]+) \|", page, flags=re.MULTILINE)
    assert rows
    for path, valid, test, transfer in rows:
        summary = json.loads((ROOT / path).read_text())
        last = summary["valid_accuracy"][-1]
        found = (sum(last) / len(last), summary["average_accuracy"], summary["backward_transfer"])
        assert (valid, test, transfer) == tuple(map(format, found, (".2f", ".2f", "+.2f"))), path


def test_what_bfloat16_costs_is_what_the_results_say():
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (\d) \| (\S+) / (\S+) \| (\S+) / (\S+) \| ([-+]\S+) \|$", page, flags=re.MULTILINE)
    assert len(rows) == 4
    for n_epochs, seed, *said in rows:
        found = []
        for folder, variant in (("real", ""), ("search/real", ",amp=bf16")):
            path = ROOT / f"results/{folder}/cifar100/gpm/n_epochs={n_epochs}{variant}/seed-{seed}.json"
            summary = json.loads(path.read_text())
            found += [summary["average_accuracy"], summary["backward_transfer"]]
        assert said == [*map(format, [*found, found[2] - found[0]], (".2f", "+.2f", ".2f", "+.2f", "+.2f"))]


@pytest.mark.parametrize(
    ("verified", "note"),
    [
        (None, "svhn: nothing here tells whether these are the published images"),
        (False, "svhn: these are not the published images, their checksums say"),
        (True, None),
    ],
)
def test_images_that_are_not_known_to_be_the_published_ones_are_named(tmp_path, verified, note):
    sources = {"svhn": {"train_sha256": "a", "verified": verified}}
    (row,) = rows_of(write(tmp_path / "run", data={"kind": "real", "sources": sources, "notes": []}))
    assert row.notes == ([note] if note else [])
    assert (row.verdict == "not comparable: data, see note") == (verified is False)


def test_a_method_at_its_own_learning_rate_stands_among_the_others(tmp_path):
    plan = [
        ("gpm", "n_epochs=5", 0.01),
        ("hat", "n_epochs=5,lr=0.05", 0.05),
        ("hat", "n_epochs=5", 0.01),
        ("hat", "lr=0.05", 0.05),
    ]
    for i, (method, variant, lr) in enumerate(plan):
        write(tmp_path / str(i), method=method, variant=variant, hyperparameters={"lr": lr})
    found = [row.variant for i in range(len(plan)) for row in rows_of(tmp_path / str(i))]
    assert found == ["n_epochs=5", "n_epochs=5", "n_epochs=5,lr=0.01", "default"]


def test_a_search_shows_the_validation_accuracy(tmp_path, capsys):
    write(tmp_path / "x", valid_accuracy=[[91.0, None], [82.0, 81.0]])
    for flags, shown in (["--against", "lr"], True), ([], False), (["--format", "csv"], True):
        assert report.main([str(tmp_path), *flags]) == 0
        assert ("81.5" in capsys.readouterr().out) == shown


def test_find_runs_takes_single_files_and_folders(tmp_path):
    folder = write(tmp_path / "x/y/seed-1")
    for path in (folder, folder / "summary.json", tmp_path):
        runs, problems = summaries.find_runs([path])
        assert [run.path for run in runs] == [folder] and not problems
    with pytest.raises(InputError, match="does not exist"):
        summaries.find_runs([tmp_path / "nothing"])
