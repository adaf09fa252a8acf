"""A run with more tasks goes on from one with fewer, with the numbers that it would have had alone."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from engine.folder import TASK_WEIGHTS
from gradproj.errors import InputError
from methods import METHODS
from tests import tiny
from tests.engine.test_same import changed, other_images
from tests.tiny import run
from tests.tiny_nets import SingleHead

pytestmark = pytest.mark.usefixtures("quick")
ONE_HEAD = [name for name, method in METHODS.items() if method.heads == "one"]


def network(method, n_tasks=3):
    return SingleHead() if method in ONE_HEAD else tiny.Network(n_tasks)


def numbers(summary):
    left_out = {"seconds", "folder", "interference", "hyperparameters"}
    return {name: value for name, value in summary.items() if name not in left_out}


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.joint])
@pytest.mark.parametrize("later_heads", [False, True], ids=["all heads", "a head added"])
def test_the_same_numbers_as_alone(tmp_path, method, later_heads, capsys):
    changes = {"method": method, "lr_patience": 2}
    whole_model, model = network(method), network(method)
    whole = run(tiny.options(tmp_path / "whole", **changes), tiny.benchmark(), whole_model)
    shorter = network(method, 2 if later_heads else 3)
    before = run(tiny.options(tmp_path / "grown", n_tasks=2, **changes), tiny.benchmark(), shorter)
    capsys.readouterr()
    grown = run(tiny.options(tmp_path / "grown", quiet=False, **changes), tiny.benchmark(), model)
    said = capsys.readouterr().out
    if method == "hat" and later_heads:  # its gates are of as many tasks as there are heads
        assert "is not continued: its network is another one: hat_embeddings.0 2x16" in said
    else:
        assert f"continued from {before['folder']}, where 2 of the tasks are learned" in said
        assert "task 3/3 epoch 1" in said
        assert "task 2/3 epoch" not in said
    assert numbers(grown) == numbers(whole)
    assert_close(model.state_dict(), whole_model.state_dict(), atol=0, rtol=0)
    again = run(
        tiny.options(tmp_path / "grown", n_tasks=2, **changes),
        tiny.benchmark(),
        network(method, 2 if later_heads else 3),
    )
    assert again["folder"] == before["folder"]  # where it was, finished


def test_the_longest_and_from_a_stopped_one(tmp_path, capsys):
    run(tiny.options(tmp_path, n_tasks=1), tiny.benchmark(4), tiny.Network(4))
    run(tiny.options(tmp_path, n_tasks=2), tiny.benchmark(4), tiny.Network(4))
    run(tiny.options(tmp_path, n_tasks=4, quiet=False), tiny.benchmark(4), tiny.Network(4))
    said = capsys.readouterr().out
    assert "n_tasks=2,n_epochs" in said
    assert "where 2 of the tasks are learned" in said


class Other(tiny.Network):
    pass


def other_start():
    return tiny.Network(seed=3)


@pytest.mark.parametrize(
    ("benchmark", "make", "changes", "reason"),
    [
        (lambda: changed(other_images), tiny.Network, {}, "task 2, clusters 1: training images"),
        (tiny.benchmark, Other, {}, "its network is another one: class tests.tiny.Network there, .*Other here"),
        (tiny.benchmark, other_start, {}, "its network began with other weights fc1.weight"),
        (tiny.benchmark, tiny.Network, {"method": "multitask"}, "what multitask learns depends on the number of tasks"),
        (tiny.benchmark, tiny.Network, {"lr": 0.04}, None),
        (tiny.benchmark, tiny.Network, {"seed": 2}, None),
    ],
)
def test_what_is_not_continued_is_learned_anew_and_says_why(tmp_path, benchmark, make, changes, reason, capsys):
    first = {name: value for name, value in changes.items() if name == "method"}
    run(tiny.options(tmp_path, n_tasks=2, **first), tiny.benchmark(), tiny.Network())
    found = run(tiny.options(tmp_path, quiet=False, **changes), benchmark(), make())
    said = capsys.readouterr().out
    if reason:
        lines = [line for line in said.splitlines() if "is not continued" in line]
        assert len(lines) == 1
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(lines[0])
    assert "continued from" not in said
    assert numbers(found) == numbers(run(tiny.options(tmp_path / "alone", **changes), benchmark(), make()))


def test_interference_and_kept_weights_come_along(tmp_path):
    options = {"keep": "each"}
    whole = run(tiny.options(tmp_path / "whole", **options), tiny.benchmark(), tiny.Network())
    run(tiny.options(tmp_path / "grown", n_tasks=2, **options), tiny.benchmark(), tiny.Network())
    grown = run(tiny.options(tmp_path / "grown", **options), tiny.benchmark(), tiny.Network())
    assert grown["interference"] == whole["interference"]
    assert whole["interference"]
    kept = {path.name for path in (tmp_path / "grown").glob("*/*/*/n_tasks=3*/*/weights-*.pt")}
    assert kept == {TASK_WEIGHTS.format(0), TASK_WEIGHTS.format(1)}


def test_no_resume_begins_anew(tmp_path, capsys):
    run(tiny.options(tmp_path, n_tasks=2), tiny.benchmark(), tiny.Network())
    run(tiny.options(tmp_path, quiet=False, no_resume=True), tiny.benchmark(), tiny.Network())
    assert "continued" not in capsys.readouterr().out


def test_a_head_for_the_new_task_must_be_there(tmp_path):
    run(tiny.options(tmp_path, n_tasks=2), tiny.benchmark(), tiny.Network(2))
    with pytest.raises(InputError, match="Network has 2 heads for 3 tasks"):
        run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network(2))


def test_other_weights_of_the_new_head(tmp_path):
    """They are those of the network given, as at the beginning of a run of its own."""
    run(tiny.options(tmp_path, n_tasks=2, method="naive"), tiny.benchmark(), tiny.Network())
    model = tiny.Network()
    with torch.no_grad():
        nn.init.constant_(model.heads[2].weight, 0.5)
    run(tiny.options(tmp_path, n_epochs=3, method="naive", lr=0.05), tiny.benchmark(), model)
    assert not torch.equal(model.heads[2].weight, tiny.Network().heads[2].weight)


def test_in_a_folder_that_was_given_it_says_how(tmp_path):
    folder = str(tmp_path / "mine")
    run(tiny.options(tmp_path, n_tasks=2, run_folder=folder), tiny.benchmark(), tiny.Network())
    with pytest.raises(InputError, match=r"\(n_tasks 2 there, 3 here\); leave --run_folder out: a run with more tasks"):
        run(tiny.options(tmp_path, run_folder=folder), tiny.benchmark(), tiny.Network())
    with pytest.raises(
        InputError, match=r"\(n_tasks 2 there, 1 here\); give another folder, or start afresh with --no_resume$"
    ):
        run(tiny.options(tmp_path, n_tasks=1, run_folder=folder), tiny.benchmark(), tiny.Network())


def test_a_run_whose_summary_alone_is_missing(tmp_path, capsys):
    first = run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network())
    (tiny.run_folder(tmp_path) / "summary.json").write_text("{")
    capsys.readouterr()
    again = run(tiny.options(tmp_path, quiet=False), tiny.benchmark(), tiny.Network())
    assert numbers(again) == numbers(first)
    assert "all tasks are learned; the summary is made from the checkpoint" in capsys.readouterr().out


def test_a_shorter_run_that_may_not_be_read_is_left_alone(tmp_path, monkeypatch, capsys):
    run(tiny.options(tmp_path, n_tasks=2), tiny.benchmark(), tiny.Network())

    def closed(folder):
        raise InputError(f"cannot read {folder}: Permission denied; nothing was changed")

    monkeypatch.setattr("engine.shorter.load_checkpoint", closed)
    assert run(tiny.options(tmp_path, quiet=False), tiny.benchmark(), tiny.Network())["finished"]
    assert "is not continued: cannot read" in capsys.readouterr().out
