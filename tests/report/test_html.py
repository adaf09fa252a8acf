"""The report in one HTML file: complete, closed to the network, and safe from what summaries say."""

from __future__ import annotations

import html.parser
import re
import shutil
import subprocess
import sys

import pytest

from report import __main__ as report
from report.html import matrix_cells
from tests.report.written import write

pytest.importorskip("itables")
EVIL = "'&\"<img src=x onerror=document.title=1>"


class Elements(html.parser.HTMLParser):
    """Tags with their attributes, in order, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture
def page(tmp_path):
    """Writes a report of what is in tmp_path/runs; returns its path."""

    def call(*flags):
        path = tmp_path / "report.html"
        assert report.main([str(tmp_path / "runs"), "--html", str(path), *flags]) == 0
        return path

    return call


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    write(
        folder / "a",
        tasks=[{"name": "cats"}, {"name": "dogs"}],
        class_incremental=[[90.0, None], [41.0, 39.0]],
        commit="abc",
    )
    write(folder / "b", method="naive", average_accuracy=9.5, backward_transfer=-30.0, memory_columns={})
    write(folder / "c", method="multitask", average_accuracy=100.0, backward_transfer=None, memory_columns={})
    return folder


def test_it_holds_tables_pictures_matrices_and_configurations(runs, page):
    found = Elements(page().read_text())
    text = "".join(found.texts)
    for expected in ("10-split CIFAR-100, real data", "GPM", "80.00", "72.48 ± 0.40", "class-inc. %", "40.00", "abc"):
        assert expected in text
    assert "python main_cifar100.py --method gpm --seed 1" in text
    tips = [attributes["data-tip"] for tag, attributes in found.tags if "data-tip" in attributes]
    assert "80.00 % on task 1 (cats) after learning task 2 (dogs)" in tips
    assert "41.00 % on task 1 (cats) after learning task 2 (dogs)" in tips
    names = {attributes["alt"] for tag, attributes in found.tags if tag == "img"}
    stem = "real-cifar100-default"
    assert {f"{stem}-accuracy_over_time", f"{stem}-class_incremental", f"{stem}-methods", f"{stem}-gpm-memory"} == names
    assert sum(tag == "details" for tag, _ in found.tags) == 2 * 3 + 1  # each run and its configuration; commands
    assert "/home/me" not in text  # nothing of the machine's folders


def test_it_needs_no_network(runs, page):
    text = page().read_text()
    for tag, attributes in Elements(text).tags:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("data:", "#")), (tag, attributes[name][:80])
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; ") and "http" not in policy


def test_it_is_the_same_file_each_time(runs, page):
    assert page().read_bytes() == page().read_bytes()


def test_unfinished_runs_are_listed(runs, page):
    (runs / "b" / "summary.json").unlink()
    assert f"unfinished: {runs / 'b'}" in page().read_text()


def test_a_wide_picture_has_the_pages_width(runs, page):
    for i, method in enumerate(("er", "ewc", "hat", "owm", "a_gem", "sgp", "trgp", "cuber")):
        write(runs / str(i), method=method)
    tags = Elements(page().read_text()).tags
    classes = {
        image["alt"]: figure.get("class")
        for (_, figure), (tag, image) in zip(tags, tags[2:], strict=False)
        if tag == "img"
    }
    stem = "real-cifar100-default"
    assert classes[f"{stem}-methods"] == "wide" and classes[f"{stem}-gpm-memory"] is None


def test_a_sweep_is_in_it_too(tmp_path, page, capsys):
    for value in (0.9, 0.99):
        changes = {"variant": f"threshold={value}", "hyperparameters": {"threshold": [value]}}
        write(tmp_path / "runs" / str(value), **changes)
    write(tmp_path / "runs" / "other", benchmark="pmnist")  # which was not swept
    assert 'alt="real-cifar100-default-gpm-threshold-sweep"' in page("--against", "threshold").read_text()


def test_nothing_that_a_summary_says_becomes_html(tmp_path, page):
    changes = {
        **{
            "title": EVIL,
            "task_identity": False,
            "variant": f"lr={EVIL}",
            "benchmark": EVIL,
            "commit": EVIL,
            "device": EVIL,
        },
        **{"tasks": [{"name": EVIL}] * 2, "hyperparameters": {EVIL: EVIL}, "versions": {EVIL: EVIL}},
        "data": {"kind": "real", "notes": [EVIL], "sources": {EVIL: {"verified": False}}},
    }
    write(tmp_path / "runs" / "a", **changes)
    write(tmp_path / "runs" / EVIL.replace("/", "")[:60]).joinpath("summary.json").write_text("{")
    found = Elements(page().read_text())
    assert {attributes["src"][:5] for tag, attributes in found.tags if tag == "img"} == {"data:"}
    assert not [attributes for _, attributes in found.tags if "onerror" in attributes]
    assert sum(tag == "script" for tag, _ in found.tags) == 1
    assert "".join(found.texts).count("onerror") > 8  # it is all there, as text


def test_cells_of_a_matrix():
    first, second = matrix_cells([[100.0, None], [7.25, 50.0]], [])
    assert first == [{"text": "100.0", "style": "background:#fde725;color:#000"} | first[0], None]
    assert second[0]["tip"] == "7.25 % on task 1 after learning task 2"
    assert second[0]["style"].endswith("color:#fff")
    assert matrix_cells([[1.0]], ["a", "b"])[0][0]["tip"] == "1.00 % on task 1 (a) after learning task 1 (a)"


def test_a_missing_package_is_one_line(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "itables", None)
    assert report.main([str(runs), "--html", str(tmp_path / "x.html")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "pip install 'itables>=2.9,<3' jinja2" in error
    assert not (tmp_path / "x.html").exists()


def test_a_place_that_cannot_be_written_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert report.main([str(runs), "--html", str(tmp_path / "file" / "x.html")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=10000 --window-size=1400,1000"
).split()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_in_a_browser(runs, page, tmp_path):
    """A click on a heading sorts by the numbers; what a summary says is not run; the picture is drawn."""
    write(runs / "d", method="er", title=EVIL, task_identity=False, average_accuracy=50.0, tasks=[{"name": EVIL}] * 2)
    path = page()
    clicks = """<script type="module">
    const heading = [...document.querySelectorAll("th")].find(th => th.textContent.startsWith("ACC %"));
    const column = () => [...document.querySelectorAll("table.rows td[data-order]")].filter(
        td => td.cellIndex === heading.cellIndex).map(td => td.textContent.trim());
    const click = () => heading.querySelector(".dt-column-order").click();
    const wait = () => new Promise(done => setTimeout(done, 100));
    click(); await wait(); const up = column(); click(); await wait();
    const [img] = document.images;
    document.body.dataset.found = [document.title, up, column(), img.naturalWidth > 300].join("; ");
    </script>"""
    path.write_text(path.read_text().replace("</body>", f"{clicks}</body>"))

    def chromium(*flags):
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={tmp_path / 'browser'}", *flags, path.as_uri()]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout

    (found,) = re.findall(r'data-found="([^"]*)"', chromium("--dump-dom"))
    assert found == "4 runs; 9.50,50.00,80.00,100.00; 100.00,80.00,50.00,9.50; true"
    chromium(f"--screenshot={tmp_path / 'shot.png'}")
    assert (tmp_path / "shot.png").stat().st_size > 20_000
