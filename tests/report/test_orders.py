"""Rows over several orders of tasks, and rows whose runs were made by several commits."""

from __future__ import annotations

import pytest

from report import __main__ as report
from report import pages, tables
from report.rows import summarise, without
from sweep import __main__ as sweep
from sweep import plan
from tests.report.written import rows_of, write

RELEASED = "protocol=released"


def superclass_run(folder, order, seed=1, **changes):
    """A run of the superclass benchmark in one of its orders, as the engine names it."""
    variant = RELEASED + (f",t_order={order}" if order else "")
    options = {"protocol": "released", "t_order": order}
    given = {"benchmark": "cifar100_superclass", "variant": variant, "seed": seed, "hyperparameters": options}
    return write(folder / f"{order}-{seed}", **(given | changes))


def test_orders_of_tasks_are_one_row_compared_with_the_paper_s(tmp_path):
    for order, accuracy in ((0, 57.0), (1, 58.0), (2, 59.0)):
        superclass_run(tmp_path, order, average_accuracy=accuracy, backward_transfer=-1.0)
    (row,) = rows_of(tmp_path)
    assert (row.accuracy.mean, row.accuracy.std, row.accuracy.n) == (58.0, 1.0, 3)
    assert (row.variant, row.orders, row.seeds, row.verdict) == (RELEASED, [0, 1, 2], [1], "yes")
    (line,), _ = tables.table([row])
    assert line["runs"] == "orders 0–2, seed 1" and line["paper ACC"] == "57.70 ± 0.70"


def test_an_order_other_than_the_first_is_named(tmp_path):
    (row,) = rows_of(superclass_run(tmp_path, 3))
    assert tables.table([row])[0][0]["runs"] == "order 3, seed 1"
    assert tables.command(row) == (
        "python main_cifar100_superclass.py --method gpm --protocol released --t_order 3 --seed 1"
    )


@pytest.mark.parametrize(
    ("runs", "n_commands"),
    [([(0, 1)], 1), ([(2, 1)], 1), ([(0, 1), (1, 1), (3, 1)], 1), ([(0, 1), (0, 2)], 1), ([(4, 1), (4, 2)], 1)]
    + [([(0, 1), (1, 1), (0, 2), (1, 2)], 1), ([(0, 1), (0, 2), (1, 1)], 2)],
)
def test_the_command_makes_exactly_the_runs_of_the_row(tmp_path, runs, n_commands):
    for order, seed in runs:
        superclass_run(tmp_path, order, seed)
    (row,) = rows_of(tmp_path)
    commands = tables.command(row).split(" && ")
    assert len(commands) == n_commands
    found = []
    for command in commands:
        words = command.split()
        if words[0] == "bash":
            jobs = [job.hyperparameters for job in plan.make_jobs(sweep.wanted(*sweep.parse(words[2:])))]
        else:
            options = plan.script_options("cifar100_superclass")
            jobs = [vars(plan.cli.parse(options, plan.METHODS, words[2:], None)[0])]
        found += [(job["t_order"], job["seed"]) for job in jobs]
        assert all(job["protocol"] == "released" for job in jobs)
    assert sorted(found) == sorted(runs)


def test_the_same_order_and_seed_twice_counts_once(tmp_path):
    superclass_run(tmp_path / "a", 2)
    superclass_run(tmp_path / "b", 2, accuracy=[[91.0, None], [80.0, 80.0]])
    (row,) = rows_of(tmp_path)
    assert len(row.runs) == 1 and "order 2, seed 1 is there twice with different numbers" in row.notes[0]


def test_orders_are_drawn_apart_when_they_are_what_is_swept(tmp_path):
    for order in (0, 1):
        superclass_run(tmp_path / "runs", order)
    arguments = [str(tmp_path / "runs"), "--plots", str(tmp_path / "figures"), "--against", "t_order"]
    assert report.main(arguments) == 0
    assert (tmp_path / "figures" / "real-cifar100_superclass-protocol-released-gpm-t_order-sweep.png").exists()
    runs = [run for row in rows_of(tmp_path / "runs") for run in row.runs]
    assert [row.variant for row in summarise(runs, join_orders=False)] == [RELEASED, f"{RELEASED},t_order=1"]


def test_forward_transfer_is_against_networks_of_the_same_order(tmp_path):
    superclass_run(tmp_path, 1, accuracy=[[90.0, None], [80.0, 75.0]])
    alone = {"method": "single", "backward_transfer": 0.0}
    superclass_run(tmp_path / "other", 0, accuracy=[[90.0, None], [90.0, 20.0]], **alone)
    assert {row.method: row.forward_transfer for row in rows_of(tmp_path)}["gpm"] is None
    superclass_run(tmp_path / "same", 1, seed=5, accuracy=[[90.0, None], [90.0, 70.0]], **alone)
    assert {row.method: row.forward_transfer for row in rows_of(tmp_path)}["gpm"].mean == 5.0


def test_a_variant_without_some_hyperparameters():
    assert without("default", ["lr"]) == "default"
    assert without("lr=0.1", ["lr"]) == "default"
    assert without("n_epochs=2,lr=0.1,lr_min=1", ["lr"]) == "n_epochs=2,lr_min=1"


def test_a_row_whose_runs_mix_commits_says_which_made_which(tmp_path):
    for seed, commit in ((1, "aaa"), (2, "bbb"), (3, "bbb")):
        write(tmp_path / str(seed), seed=seed, commit=commit)
    (row,) = rows_of(tmp_path)
    assert row.origin == "made by 2 states of the code: aaa (seed 1), bbb (seeds 2, 3)"
    assert "[1] made by 2 states" in tables.as_markdown([row], []) and "| aaa, bbb |" in tables.as_markdown([row], [])
    assert "made by 2 states" in tables.as_text([row], []) and "made by 2 states" in tables.as_csv([row], [])
    assert "made by" not in pages.short_table([row], []), "the page of all results says so"
    assert row.verdict.startswith("no (")  # compared all the same
