"""The array cache: damaged files are named, interrupted conversions leave nothing, and one process prepares for all."""

import itertools
import os
import pickle
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from dataloader.embedded import render as embedded
from dataloader.errors import DataError
from dataloader.images import cache, raw
from dataloader.images.cache import FILES, SPECS, RawSet
from engine.interrupts import Stopped, stoppable
from tests.faults import COUNTS, fork, fork_and_wait, signalled_at, trace, wait

DATALOADER = os.path.dirname(cache.__file__)  # noqa: PTH120


def images(n: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(n)
    return generator.integers(256, size=(n, 28, 28), dtype=np.uint8), np.arange(n) % 10


@pytest.fixture
def small_set() -> RawSet:
    return RawSet(*images(30), *images(20))


@pytest.fixture
def download(monkeypatch, small_set):
    """Stands in for the download; `download.work` is done first."""
    stub = SimpleNamespace(calls=[], work=lambda: None)

    def fetch(name, data_dir):
        stub.calls.append(name)
        stub.work()
        return small_set

    monkeypatch.setitem(sys.modules, "dataloader.images.download", SimpleNamespace(download=fetch))
    return stub


def same(a: RawSet, b: RawSet) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_damaged_files_are_named(tmp_path, small_set):
    folder = tmp_path / "mnist"
    cache.write_cache(folder, small_set)
    for name in FILES:
        content = (folder / name).read_bytes()
        bad = {
            "empty": b"",
            "cut in the header": content[:20],
            "cut in the data": content[:-1],
            "magic": b"\x92NUMPY" + content[6:],
            "header": content[:30] + b"((((" + content[34:],
            "another type": content.replace(b"|u1", b"<f8").replace(b"<i8", b"<f8"),
            "pickle": pickle.dumps([1, 2]),
            "archive": b"PK\x03\x04" + content,
        }
        for damage in bad.values():
            (folder / name).write_bytes(damage)
            with pytest.raises(DataError, match=rf"{name}.*delete this file") as caught:
                raw.load_raw("mnist", tmp_path)
            assert "\n" not in str(caught.value)
            COUNTS["damaged files"] += 1
        (folder / name).write_bytes(content)
    assert same(raw.load_raw("mnist", tmp_path), small_set)


def test_arrays_that_do_not_fit_are_named(tmp_path, small_set):
    folder = tmp_path / "mnist"
    cache.write_cache(folder, small_set)
    n = len(small_set.train_labels)
    for name, array in [
        ("train_images", np.zeros((n, 32, 32), np.uint8)),
        ("train_images", np.zeros((0, 28, 28), np.uint8)),
        ("train_images", np.zeros((n, 28, 28), np.float32)),
        ("train_labels", np.zeros(n + 1, np.int64)),
        ("train_labels", np.full(n, 10)),
        ("train_labels", np.full(n, -1)),
        ("train_labels", np.zeros(n)),
    ]:
        np.save(folder / f"{name}.npy", array)
        with pytest.raises(DataError, match=r"train_(images|labels).npy holds"):
            raw.load_raw("mnist", tmp_path)
        np.save(folder / f"{name}.npy", getattr(small_set, name))
        COUNTS["damaged files"] += 1


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("no\nnetwork"), EOFError()])
def test_failed_download_leaves_nothing_and_says_the_way_out(tmp_path, download, small_set, error):
    def fail() -> None:
        raise error

    download.work = fail
    with pytest.raises(DataError, match="no download.*--data embedded") as caught:
        raw.load_raw("mnist", tmp_path)
    assert "\n" not in str(caught.value)
    assert cache.missing_files(tmp_path / "mnist") == list(FILES)
    download.work = lambda: None
    assert same(raw.load_raw("mnist", tmp_path), small_set)


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "folder with one file"])
def test_conversion_killed_anywhere_leaves_no_half_cache(tmp_path, download, small_set, there):
    def prepare(folder):
        if there:
            (folder / "mnist").mkdir(parents=True)
            np.save(folder / "mnist" / "test_labels.npy", np.zeros(3, np.int64))
        return folder

    lines = trace(lambda: raw.load_raw("mnist", prepare(tmp_path / "traced")), DATALOADER)
    for n in range(0, len(lines), 2):
        folder = prepare(tmp_path / str(n))
        code = fork_and_wait(
            lambda n=n, folder=folder: signalled_at(
                n, signal.SIGKILL, lambda: raw.load_raw("mnist", folder), DATALOADER
            ),
            tmp_path / "log",
        )
        assert code == -signal.SIGKILL
        if not cache.missing_files(folder / "mnist"):
            assert same(cache.read_cache(folder / "mnist", SPECS["mnist"]), small_set)
        assert same(raw.load_raw("mnist", folder), small_set), f"killed at {lines[n]}"
        left = {path for path in folder.iterdir() if path.name not in ("mnist", ".mnist.lock")}
        assert not any(list(path.iterdir()) for path in left)  # at most the empty temporary folder
        COUNTS["kills"] += 1


@pytest.mark.filterwarnings("ignore:Exception ignored in")  # a file that was just being opened, left to the collector
def test_conversion_stopped_by_a_signal_leaves_nothing(tmp_path, download, small_set):
    lines = trace(lambda: raw.load_raw("mnist", tmp_path / "traced"), DATALOADER)
    for n in range(0, len(lines), 4):
        folder = tmp_path / str(n)
        with pytest.raises(Stopped):
            signalled_at(n, signal.SIGTERM, lambda folder=folder: raw.load_raw("mnist", folder), DATALOADER)
        assert same(raw.load_raw("mnist", folder), small_set)
        assert {path.name for path in folder.iterdir()} == {"mnist", ".mnist.lock"}


def test_one_downloads_while_the_other_waits(tmp_path, download, small_set):
    (tmp_path / "log").touch()

    def slow() -> None:
        with (tmp_path / "downloads").open("a") as file:
            file.write("x")
        time.sleep(0.3)

    def work() -> None:
        assert same(raw.load_raw("mnist", tmp_path), small_set)

    download.work = slow
    children = [fork(work, tmp_path / "log") for _ in range(3)]
    assert [wait(child) for child in children] == [0, 0, 0], (tmp_path / "log").read_text()
    assert (tmp_path / "downloads").read_text() == "x"


def test_one_renders_while_the_other_waits(tmp_path, monkeypatch):
    monkeypatch.setitem(embedded.RECIPES, "mnist", embedded.RECIPES["mnist"]._replace(n_train=3, n_test=2))
    expected, render = embedded.render("mnist"), embedded.render

    def counted(name):
        with (tmp_path / "renderings").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return render(name)

    def work() -> None:
        assert same(embedded.load_raw("mnist", tmp_path / "data"), expected)

    monkeypatch.setattr(embedded, "render", counted)
    children = [fork(work, tmp_path / "log") for _ in range(3)]
    assert [wait(child) for child in children] == [0, 0, 0], (tmp_path / "log").read_text()
    assert (tmp_path / "renderings").read_text() == "x"


def test_killed_while_preparing_frees_the_lock(tmp_path, download, small_set):
    download.work = lambda: os.kill(os.getpid(), signal.SIGKILL)
    assert fork_and_wait(lambda: raw.load_raw("mnist", tmp_path), tmp_path / "log") == -signal.SIGKILL
    download.work = lambda: None
    assert same(raw.load_raw("mnist", tmp_path), small_set)
    COUNTS["kills"] += 1


def test_waiting_for_another_process_can_be_interrupted(tmp_path, download):
    ready, tell = os.pipe()

    def busy() -> None:
        os.write(tell, b".")
        time.sleep(60)

    def waiting() -> None:
        with stoppable():
            raw.load_raw("mnist", tmp_path)

    download.work = busy
    holder = fork(lambda: raw.load_raw("mnist", tmp_path), tmp_path / "holder")
    os.read(ready, 1)
    child = fork(waiting, tmp_path / "log")
    time.sleep(0.3)
    os.kill(child, signal.SIGINT)
    assert wait(child) == 130
    os.kill(holder, signal.SIGTERM)
    assert wait(holder) == 143
    assert "Traceback" not in (tmp_path / "log").read_text() + (tmp_path / "holder").read_text()


def test_unwritable_folder_renders_for_this_run_only(tmp_path, monkeypatch):
    monkeypatch.setitem(embedded.RECIPES, "mnist", embedded.RECIPES["mnist"]._replace(n_train=1, n_test=1))
    (tmp_path / "file").write_text("")
    assert same(embedded.load_raw("mnist", tmp_path / "file"), embedded.render("mnist"))


def test_every_file_is_named_when_absent(tmp_path):
    for n in range(len(FILES) + 1):
        for present in itertools.combinations(FILES, n):
            folder = tmp_path / "_".join(present or ("none",))
            folder.mkdir()
            for name in present:
                (folder / name).touch()
            assert cache.missing_files(folder) == [name for name in FILES if name not in present]
