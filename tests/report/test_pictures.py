"""The pictures of runs and of rows."""

from __future__ import annotations

import itertools

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from report import __main__ as report
from report.plots import draw as figures
from report.plots.accuracy import accuracy_heat_map, accuracy_over_time, mean_matrix
from report.plots.draw import comparisons, draw_pictures
from report.plots.interference import interference_histograms
from report.plots.memory import mean_columns, memory_growth
from report.plots.style import save
from report.published import Estimate
from tests.report.written import rows_of, write


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


def test_methods_that_do_not_read_what_names_a_variant_stand_beside_those_that_do(tmp_path):
    both = {"n_epochs": 8, "lr": 0.03}
    gpm, other_gpm = (both | {"threshold": [value]} for value in (0.9, 0.95))
    rows = rows_of(
        write(tmp_path / "a", variant="n_epochs=8,lr=0.03,threshold=0.9", hyperparameters=gpm),
        write(tmp_path / "b", variant="n_epochs=8,lr=0.03,threshold=0.95", hyperparameters=other_gpm),
        write(tmp_path / "c", method="naive", variant="n_epochs=8,lr=0.03", hyperparameters=both),
        write(tmp_path / "d", method="er", variant="n_epochs=8", hyperparameters=both),
    )
    found = [[(row.method, row.variant) for row in members] for members in comparisons(rows)]
    naive = ("naive", "n_epochs=8,lr=0.03")
    assert found == [
        [("er", "n_epochs=8")],
        [("gpm", "n_epochs=8,lr=0.03,threshold=0.9"), naive],
        [("gpm", "n_epochs=8,lr=0.03,threshold=0.95"), naive],
    ]


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


@pytest.mark.parametrize("n_rows", [2, 20])
def test_each_rows_interference_stands_inside_its_panel(tmp_path, n_rows):
    runs = [with_costs()["interference"]]
    figure = interference_histograms(
        {f"row {i}": runs for i in range(n_rows)}, {f"row {i}": "k" for i in range(n_rows)}, ""
    )
    save(figure, tmp_path / "figure.png")
    (panel,) = figure.axes
    boxes = [text.get_window_extent() for text in panel.texts]
    assert len(boxes) == n_rows
    assert all(upper.y0 >= lower.y1 - 0.5 for upper, lower in itertools.pairwise(boxes))  # pixels; none hides another
    assert boxes[-1].y0 >= panel.get_window_extent().y0


def test_costs_are_relative_to_the_largest_memory_and_per_epoch(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "bars", lambda scores, *rest, **more: drawn.append(scores) or Figure())
    write(tmp_path / "a", **with_costs())
    write(tmp_path / "b", **with_costs(method="naive", memory_floats=0, memory_input_sizes={}, memory_columns={}))
    figures.draw(rows_of(tmp_path), tmp_path / "figures")
    # 576 floats of 48 x 48 possible ones; 50 s over 2 + 3 epochs.
    gpm, naive = ((Estimate(share, None, 1), Estimate(10.0, None, 1)) for share in (25.0, 0.0))
    assert drawn[1] == {"GPM": gpm, "naive": naive}


NETWORKS = {  # interference and memory of runs of another network than `with_costs` has
    "some layers in common": ("conv1", "fc9"),
    "none in common": ("fc9",),
}


@pytest.mark.parametrize("names", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("other", [{"method": "naive"}, {"seed": 2}], ids=["beside each other", "in one row"])
def test_runs_of_different_networks_are_drawn_by_what_they_share(tmp_path, names, other):
    like = with_costs()["interference"]["conv1"]
    found = {
        "interference": dict.fromkeys(names, like),
        "memory_columns": dict.fromkeys(names, [1, 2]),
        "memory_input_sizes": dict.fromkeys(names, 9),
    }
    write(tmp_path / "runs/a", **with_costs())
    write(tmp_path / "runs/b", **with_costs(**found, **other))
    write(tmp_path / "runs/c", **with_costs(method="ewc"))
    drawn = {}
    draw_pictures(
        rows_of(tmp_path / "runs"), lambda figure, name: drawn.update({name.partition("default-")[2]: figure})
    )
    panels = [axes.get_title() for axes in drawn["interference"].axes] if "interference" in drawn else []
    assert panels == (["conv1"] if "conv1" in names else [])
    assert ("gpm-memory" in drawn) == ("conv1" in names or "method" in other)


def test_runs_of_different_numbers_of_tasks_are_rows_of_their_own(tmp_path):
    write(tmp_path / "a", average_accuracy=80.0, hyperparameters={"n_tasks": 7})  # whatever is said there
    longer = [[90.0, None, None], [80.0, 70.0, None], [70.0, 60.0, 50.0]]
    write(tmp_path / "b", seed=2, accuracy=longer, class_incremental=longer, memory_columns={"conv1": [3, 5, 6]})
    rows = rows_of(tmp_path)
    assert [(row.variant, row.seeds) for row in rows] == [("n_tasks=2", [1]), ("n_tasks=3", [2])]
    assert figures.draw(rows, tmp_path / "figures")


def test_columns_of_unknown_sizes_have_no_picture(tmp_path):
    write(tmp_path / "a", memory_input_sizes=None)
    names = [path.name for path in figures.draw(rows_of(tmp_path), tmp_path / "figures")]
    assert names and not any("memory" in name for name in names)


@pytest.mark.parametrize(
    "unknown", [{"memory_floats": None}, {"seconds": {"total": 9.0}}, {"epochs": [0, 0]}, {"epochs": None}], ids=str
)
def test_costs_that_are_not_known_are_not_drawn_as_nothing(tmp_path, monkeypatch, unknown):
    drawn = []
    monkeypatch.setattr(figures, "bars", lambda scores, *rest, **more: drawn.append(scores) or Figure())
    write(tmp_path / "a", **with_costs())
    write(tmp_path / "b", **with_costs(method="naive", **unknown))
    figures.draw(rows_of(tmp_path), tmp_path / "figures")
    if "epochs" in unknown:
        assert len(drawn) == 1  # of the accuracies
    else:
        assert [cost is None for cost in drawn[1]["naive"]] == ["memory_floats" in unknown, "seconds" in unknown]
        assert None not in drawn[1]["GPM"]


def test_a_sweep_is_drawn_over_its_hyperparameter(tmp_path, capsys):
    for value in (0.99, 0.9):
        changes = with_costs(variant=f"n_epochs=20,threshold={value}")
        write(tmp_path / f"runs/{value}", **changes, hyperparameters={"threshold": [value], "lr": 0.01})
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


@pytest.mark.parametrize(
    ("name", "values"), [("n_samples", [10, "all"]), ("samples", [{"fc1": 20}, {"fc1": 10}]), ("n_train", [None, 5])]
)
def test_a_sweep_over_values_of_any_kind(tmp_path, name, values):
    for i, value in enumerate(values):
        write(tmp_path / f"runs/{i}", variant=f"{name}={value}", hyperparameters={name: value})
    arguments = [str(tmp_path / "runs"), "--plots", str(tmp_path / "figures"), "--against", name]
    assert report.main(arguments) == 0
    assert any(path.name.endswith(f"{name}-sweep.png") for path in (tmp_path / "figures").iterdir())


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
