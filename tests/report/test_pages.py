"""The tables of the README and of the pages in docs/, against results/."""

from __future__ import annotations

import json
import re

import pytest

from report import __main__ as report
from report import pages
from report import rows as comparison
from report import runs as summaries
from tests import ROOT
from tests.report.written import rows_of, write


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
    assert [(line[0], line[1]) for line in lines if len(line) > 2][1:] == [
        ("DFGP", "default"),
        ("FS-DGPM", "default"),
        ("GPM", "n_epochs=20"),
        ("TRGP ‡", "n_epochs=20"),
    ]
    dfgp, fs_dgpm, _, trgp = [line for line in lines if len(line) > 2][1:]
    assert dfgp[4:9] == ["74.59", "-0.85", "authors' logs", "yes", "3"]
    assert fs_dgpm[7] == "not comparable: published under another protocol"
    assert trgp[7:] == ["not comparable: variant", "1,234,567", "60 s", "seed 1"]


def test_successors_on_tasks_of_ones_own(tmp_path):
    write(tmp_path / "a", method="sgp", benchmark="birds", memory_floats=None)
    text = pages.successor_tables(rows_of(tmp_path), [])
    assert text.startswith("## birds\n") and "| nothing published | – | 60 s | seed 1 |" in text


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


@pytest.mark.parametrize("kind", pages.PAGES)
def test_a_page_is_left_alone_where_no_run_is_one_of_its(tmp_path, kind, capsys):
    data = {"kind": "embedded", "notes": []}
    runs, page = tmp_path / "runs", tmp_path / "page.md"
    write(runs / "a", data=data)
    (write(runs / "b") / "summary.json").write_text("{")  # a damaged one makes no table
    page.write_text(f"{pages.BEGIN}\nbefore\n{pages.END}")
    code = report.main([str(runs), f"--{kind}", str(page)])
    if kind == "page":
        assert code == 0 and "embedded" in page.read_text()
        return
    assert code == 2 and "before" in page.read_text()
    assert capsys.readouterr().err.startswith("report: error: none of these runs is one of those that ")
