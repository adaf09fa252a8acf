"""Which runs make one row, and what is said of it."""

from __future__ import annotations

import csv
import io

import pytest

from report import __main__ as report
from report import rows as comparison
from report import tables
from report.published import PUBLISHED, Estimate, reproduced
from tests.report.written import rows_of, write


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
        (
            {"benchmark": "cifar100_superclass", "average_accuracy": 57.0, "backward_transfer": -1.0},
            "not comparable: published under protocol=released",
        ),
        (
            {"benchmark": "cifar100_superclass", "variant": "protocol=released"},
            "no (ACC above and BWT below)",
        ),
        ({"benchmark": "miniimagenet", "method": "dfgp"}, "not comparable: published under protocol=later"),
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


def test_the_time_of_a_row_is_the_median(tmp_path):
    for seed, seconds in ((1, 2088.0), (2, 482.0), (3, 447.0)):
        write(tmp_path / f"seed-{seed}", seed=seed, seconds={"total": seconds})
    (row,) = rows_of(tmp_path)
    assert row.seconds == 482.0


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


def test_runs_whose_scripts_had_other_defaults_are_other_rows(tmp_path):
    """The variant names what differs from the defaults, and these may be edited between two runs."""
    for seed, lr in ((1, 0.01), (2, 1.0), (3, 0.01)):
        write(tmp_path / str(seed), seed=seed, hyperparameters={"lr": lr, "n_epochs": 20, "device": f"cuda:{seed}"})
    rows = rows_of(tmp_path)
    assert [(row.variant, row.seeds) for row in rows] == [("lr=0.01", [1, 3]), ("lr=1.0", [2])]
    assert all(row.verdict == "not comparable: variant" for row in rows)
    assert tables.command(rows[1]) == "python main_cifar100.py --method gpm --lr 1.0 --seed 2"


def test_an_edited_default_and_the_flag_of_the_same_value_are_one_row(tmp_path):
    for seed, lr, variant in ((1, 0.01, "default"), (2, 1.0, "default"), (3, 1.0, "lr=1.0")):
        write(tmp_path / str(seed), seed=seed, variant=variant, hyperparameters={"lr": lr})
    assert [(row.variant, row.seeds) for row in rows_of(tmp_path)] == [("lr=0.01", [1]), ("lr=1.0", [2, 3])]


def test_an_old_files_flags_of_other_methods_part_no_row(tmp_path):
    for seed, value in ((1, 10.0), (2, 100.0)):
        write(tmp_path / str(seed), seed=seed, hyperparameters={"ewc_lambda": value})
    (row,) = rows_of(tmp_path)
    assert row.variant == "default"


def test_a_hyperparameter_called_like_another_method_is_one_all_the_same(tmp_path):
    for seed, value in ((1, 5), (2, 50)):
        write(tmp_path / str(seed), seed=seed, hyperparameters={"code_length": value})
    assert [row.variant for row in rows_of(tmp_path)] == ["code_length=5", "code_length=50"]


def test_a_name_given_to_own_images_parts_no_row(tmp_path):
    for seed, name in ((1, ""), (2, "pictures")):
        write(tmp_path / str(seed), seed=seed, hyperparameters={"name": name})
    (row,) = rows_of(tmp_path)
    assert row.seeds == [1, 2]


def test_a_mean_over_other_tasks_or_networks_is_noted(tmp_path):
    """Of one's own benchmarks; of the published ones the hyperparameters tell."""
    tasks = [[{"name": "a", "classes": ["x"]}, {"name": "b", "classes": [name]}] for name in "yz"]
    for benchmark in ("mine", "cifar100"):
        for seed in (1, 2):
            changes = {"tasks": tasks[seed - 1], "network": {"class": "N", "fingerprint": str(seed)}}
            write(tmp_path / benchmark / str(seed), benchmark=benchmark, seed=seed, **changes)
    told = {row.benchmark: " ".join(row.notes) for row in rows_of(tmp_path)}
    assert (
        "are of different tasks: their mean says little" in told["mine"] and "different tasks" not in told["cifar100"]
    )
    assert all("are of different networks" in text for text in told.values())


def test_folders_that_may_not_be_entered_are_listed(tmp_path, monkeypatch, capsys):
    write(tmp_path / "a" / "seed-1")

    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", str(tmp_path / "b")))
        yield str(tmp_path / "a" / "seed-1"), [], ["summary.json"]

    monkeypatch.setattr("report.runs.os.walk", walk)
    assert report.main([str(tmp_path)]) == 1
    assert f"missing: {tmp_path / 'b'}" in (text := capsys.readouterr().out) and "Permission denied" in text


def test_rows_of_ones_own_benchmarks_have_no_command(tmp_path):
    write(tmp_path / "a", benchmark="mine")
    assert tables.command(rows_of(tmp_path)[0]) == "–"
