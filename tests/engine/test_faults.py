"""Killed processes, damaged files, full and read-only disks: nothing saved is lost and nothing wrong goes unnoticed."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from engine import experiment
from engine.files import write_text
from engine.folder import NEWEST, NEXT, RESERVE, load_checkpoint, save_checkpoint
from engine.interrupts import stoppable
from gradproj.errors import InputError
from gradproj.files import load_tensors, save_tensors
from tests.faults import (
    COUNTS,
    fork,
    fork_and_wait,
    lines_traced,
    moments,
    outcome,
    signal_later,
    signalled_at,
    small_run,
    trace,
    wait,
)

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def expected(tmp_path):
    """What an uninterrupted run ends with."""
    small_run(tmp_path / "whole")
    return outcome(tmp_path / "whole")


@pytest.fixture
def half(tmp_path):
    """The folder of a run that stopped in its second task, with two states on disk."""

    class Enough(Exception):
        pass

    def stop(self, epoch):
        if (epoch.task, epoch.epoch) == (1, 3):
            raise Enough
        epoch_done(self, epoch)

    epoch_done = experiment.Run.epoch_done
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Enough):
        patch.setattr(experiment.Run, "epoch_done", stop)
        small_run(tmp_path / "half")
    assert (tmp_path / "half" / NEWEST).exists()
    assert (tmp_path / "half" / RESERVE).exists()
    return tmp_path / "half"


def one_line(log: Path, text: str) -> None:
    """What went wrong was said in one line."""
    content = log.read_text()
    assert "Traceback" not in content
    errors = [line for line in content.splitlines() if "error:" in line]
    assert len(errors) == 1, content
    assert text in errors[0]


class TestKills:
    @pytest.mark.slow
    def test_at_random_times(self, tmp_path, expected):
        chooser, killed = random.Random(3), 0
        began = time.perf_counter()
        assert fork_and_wait(lambda: small_run(tmp_path / "timed"), tmp_path / "log") == 0
        duration = time.perf_counter() - began
        for trial in range(100):
            folder = tmp_path / f"run{trial}"
            child = fork(lambda folder=folder: small_run(folder), tmp_path / "log")
            code = signal_later(child, chooser.uniform(0.05, 1) * duration, signal.SIGKILL)
            killed += code == -signal.SIGKILL
            small_run(folder)
            assert outcome(folder) == expected
            assert not list(folder.glob(".*.tmp"))
            if killed == 24:
                break
        assert killed >= 20
        COUNTS["kills"] += killed

    @pytest.mark.slow
    def test_before_each_step_of_a_save(self, tmp_path, expected):
        """A moment for every line that writes a file, each killed anew when it goes on, until the run is through."""
        lines = trace(lambda: small_run(tmp_path / "traced"))
        for n in moments(lines, ("checkpoint.py", "files.py"), 10, seed=4):
            folder = tmp_path / str(n)
            code = fork_and_wait(
                lambda n=n, folder=folder: signalled_at(n, signal.SIGKILL, lambda: small_run(folder)), tmp_path / "log"
            )
            assert code == -signal.SIGKILL
            COUNTS["kills"] += 1
            small_run(folder)
            assert outcome(folder) == expected, f"killed at {lines[n]}"

    def test_again_and_again(self, tmp_path, expected):
        chooser, kills = random.Random(5), 0
        folder, log = tmp_path / "run", tmp_path / "log"
        length = len(trace(lambda: small_run(tmp_path / "traced")))
        while not (folder / "summary.json").exists():
            n = chooser.randrange(length // 4, length // 2)
            code = fork_and_wait(lambda n=n: signalled_at(n, signal.SIGKILL, lambda: small_run(folder)), log)
            assert code in (0, -signal.SIGKILL), log.read_text()
            kills += code != 0
        assert kills >= 2
        assert outcome(folder) == expected
        COUNTS["kills"] += kills

    def test_with_a_damaged_newest_state_while_saving_the_next(self, tmp_path, half, expected):
        (half / NEWEST).write_bytes(b"damaged")
        state = load_tensors(half / RESERVE)
        for n in range(len(trace(lambda: save_checkpoint(copy(half, tmp_path / "traced"), state)))):
            folder = copy(half, tmp_path / str(n))
            fork_and_wait(
                lambda n=n, folder=folder: signalled_at(n, signal.SIGKILL, lambda: save_checkpoint(folder, state)),
                tmp_path / "log",
            )
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert load_checkpoint(folder) is not None
            COUNTS["kills"] += 1


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def damaged(content: bytes, n: int, seed: int) -> Iterator[bytes]:
    """Cut short, with a bit flipped, empty, foreign."""
    chooser = random.Random(seed)
    yield from (b"", b"\0" * len(content), b"PK\x03\x04", content[:-1], content + b"\n", content[:80])
    for _ in range(n):
        yield content[: chooser.randrange(len(content))]
        place = chooser.randrange(len(content))
        yield content[:place] + bytes([content[place] ^ (1 << chooser.randrange(8))]) + content[place + 1 :]


class TestDamagedCheckpoint:
    def test_every_damage_is_noticed(self, half):
        content, previous = (half / NEWEST).read_bytes(), load_tensors(half / RESERVE)
        for bad in damaged(content, 60, seed=6):
            (half / NEWEST).write_bytes(bad)
            with pytest.warns(UserWarning, match="checkpoint.pt is damaged.*older state"):
                found = load_checkpoint(half)
            assert found["epochs"] == previous["epochs"]
            COUNTS["damaged files"] += 1

    @pytest.mark.parametrize("bad", ["truncated", "flipped", "empty"])
    def test_run_goes_back_to_the_state_before(self, half, expected, bad):
        content = (half / NEWEST).read_bytes()
        bad = {"truncated": content[:1000], "flipped": content[:-9] + b"!" + content[-8:], "empty": b""}[bad]
        (half / NEWEST).write_bytes(bad)
        with pytest.warns(UserWarning, match="checkpoint.pt is damaged.*older state") as caught:
            small_run(half)
        assert len(caught) == 1
        assert outcome(half) == expected
        COUNTS["damaged files"] += 1

    def test_run_starts_afresh_where_both_are_damaged(self, half, expected, capsys):
        for name in (NEWEST, RESERVE):
            (half / name).write_bytes((half / name).read_bytes()[:500])
        with pytest.warns() as caught:
            small_run(half, quiet=False)
        assert [str(warning.message).partition(str(half))[2][:30] for warning in caught[:2]] == [
            "/checkpoint.pt is damaged: its",
            "/checkpoint-previous.pt is dam",
        ]
        assert re.search("no state in .* can be read, so there is none to go on from", str(caught[2].message))
        assert "continued" not in capsys.readouterr().out
        assert outcome(half) == expected
        COUNTS["damaged files"] += 2

    def test_pickled_code_is_not_run(self, half, tmp_path):
        class Harmful:
            def __reduce__(self):
                return Path.touch, (tmp_path / "harmed",)

        save_tensors(half / NEWEST, {"model": Harmful()})
        with pytest.raises(Exception, match="weights_only|Unsupported|unpickle"):
            load_tensors(half / NEWEST)
        assert not (tmp_path / "harmed").exists()

    def test_sound_file_of_something_else_is_named(self, half):
        for state in ({"bases": {}, "n_updates": 1}, [1, 2], load_tensors(half / NEWEST) | {"model": {}}):
            save_tensors(half / NEWEST, state)
            with pytest.raises(InputError, match="checkpoint in .* is of another model or program.*--no_resume"):
                small_run(half)
            COUNTS["damaged files"] += 1

    def test_state_of_an_older_version_goes_on(self, half, expected):
        """Then every run recorded all methods' flags, and gpm's state was that of its bases."""
        state = load_tensors(half / NEWEST)
        assert state["task_progress"] is not None
        old = {"owm_alpha": 100.0, "hat_smax": 400.0, "replay_batch": None}
        progress = state["task_progress"] | {"method": state["task_progress"]["method"]["memory"]}
        changed = {"method": state["method"]["memory"], "task_progress": progress}
        hyperparameters = state["hyperparameters"] | old
        save_tensors(half / NEWEST, state | changed | {"hyperparameters": hyperparameters})
        small_run(half)
        assert outcome(half) == expected

    def test_interrupted_between_two_renames(self, half, expected):
        (half / RESERVE).unlink()
        (half / NEWEST).rename(half / RESERVE)
        small_run(half)
        assert outcome(half) == expected

    def test_next_state_left_by_a_killed_process_is_the_newest(self, half, expected):
        (half / NEWEST).rename(half / NEXT)
        newest = load_tensors(half / NEXT)
        assert load_checkpoint(half)["epochs"] == newest["epochs"]
        small_run(half)
        assert not (half / NEXT).exists()
        assert outcome(half) == expected


class TestDamagedOutputs:
    @pytest.mark.parametrize("name", ["summary.json", "config.json", "epochs.jsonl", "accuracy.csv"])
    def test_are_made_again_from_the_checkpoint(self, tmp_path, expected, name):
        folder = tmp_path / "whole"
        content = (folder / name).read_bytes()
        for bad in (b"", content[: len(content) // 2], b"\xff\xfe\x00", b"[1, 2]", b"{}"):
            (folder / name).write_bytes(bad)
            if name != "summary.json":
                (folder / "summary.json").unlink(missing_ok=True)  # with it there is nothing left to do
            small_run(folder)
            assert outcome(folder) == expected
            assert (folder / name).read_bytes()[:40] == content[:40]
            COUNTS["damaged files"] += 1

    def test_vanished_folder(self, half, expected, monkeypatch):
        """Deleted under a running process: its results appear nevertheless."""
        epoch_done = experiment.Run.epoch_done

        def vanish(self, epoch):
            shutil.rmtree(half, ignore_errors=True)
            epoch_done(self, epoch)

        with monkeypatch.context() as patch:
            patch.setattr(experiment.Run, "epoch_done", vanish)
            small_run(half)
        assert json.loads((half / "summary.json").read_text())["accuracy"] == expected["accuracy"]


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


class TestFullDisk:
    @pytest.mark.parametrize("n_bytes", [0, 1, 700, 3000, 5000])
    def test_file_size_limit(self, half, expected, tmp_path, n_bytes):
        before = {name: (half / name).read_bytes() for name in (NEWEST, RESERVE)}

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
            small_run(half)

        # The log is a file too: what does not fit is not there to be read.
        code = fork_and_wait(limited, tmp_path / "log")
        assert code == 2 if n_bytes > 200 else code > 0
        if n_bytes > 700:
            one_line(tmp_path / "log", "cannot write")
        assert {name: (half / name).read_bytes() for name in before} == before
        assert not list(half.glob(".*.tmp"))
        small_run(half)
        assert outcome(half) == expected
        COUNTS["full or read-only disks"] += 1

    @pytest.mark.parametrize("kilobytes", [12, 24, 32])
    def test_small_file_system(self, tmp_path, expected, kilobytes):
        with mounted(tmp_path / "disk", f"size={kilobytes}k") as disk:
            code = fork_and_wait(lambda: small_run(disk / "run"), tmp_path / "log")
            assert code == 2, (tmp_path / "log").read_text()
            one_line(tmp_path / "log", "No space left on device")
            saved = list((disk / "run").glob("checkpoint*"))
            for path in saved:
                load_tensors(path)
            assert saved or kilobytes < 24
            subprocess.run(["mount", "-o", "remount,size=10m", str(disk)], check=True)
            small_run(disk / "run")
            assert outcome(disk / "run") == expected
        COUNTS["full or read-only disks"] += 1

    def test_older_file_stays(self, tmp_path):
        write_text(tmp_path / "file", "old")

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
            write_text(tmp_path / "file", "new")

        assert fork_and_wait(limited, tmp_path / "log") != 0
        assert (tmp_path / "file").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


class TestReadOnly:
    def test_below_a_file(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match="cannot write to .*file/run: Not a directory; choose another folder"):
            small_run(tmp_path / "file" / "run")
        COUNTS["full or read-only disks"] += 1

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write to every folder")
    def test_without_permission(self, half):
        half.chmod(0o555)
        try:
            with pytest.raises(InputError, match="cannot write"):
                small_run(half)
        finally:
            half.chmod(0o755)
        COUNTS["full or read-only disks"] += 1

    def test_file_system(self, tmp_path):
        with mounted(tmp_path / "disk", "ro") as disk:
            assert fork_and_wait(lambda: small_run(disk / "run"), tmp_path / "log") == 2
            one_line(tmp_path / "log", "Read-only file system")
        COUNTS["full or read-only disks"] += 1

    def test_that_becomes_so_during_a_run(self, tmp_path, half, expected):
        epoch_done = experiment.Run.epoch_done

        def frozen(flag: str) -> bool:
            command = ["chattr", flag, str(half)]
            return not (shutil.which("chattr") is None or subprocess.run(command, capture_output=True).returncode)

        def freeze(self, epoch):
            frozen("+i")
            epoch_done(self, epoch)

        def work() -> None:
            experiment.Run.epoch_done = freeze
            small_run(half)

        if not frozen("+i"):
            pytest.skip("no file attributes here (chattr)")
        frozen("-i")
        try:
            assert fork_and_wait(work, tmp_path / "log") == 2
        finally:
            frozen("-i")
        one_line(tmp_path / "log", "cannot write")
        small_run(half)
        assert outcome(half) == expected
        COUNTS["full or read-only disks"] += 1


class TestTwoProcesses:
    def test_second_names_the_first(self, tmp_path, half, expected):
        ready, tell = os.pipe()

        def first() -> None:
            def hold_on(self, epoch):
                os.write(tell, b".")
                time.sleep(60)

            experiment.Run.epoch_done = hold_on
            small_run(half)

        child = fork(first, tmp_path / "first")
        assert os.read(ready, 1)
        before = sorted(path.name for path in half.iterdir())
        assert fork_and_wait(lambda: small_run(half), tmp_path / "second") == 2
        one_line(tmp_path / "second", f"process {child} on")
        assert sorted(path.name for path in half.iterdir()) == before
        # Killed, the first holds it no longer.
        assert signal_later(child, 0, signal.SIGKILL) == -signal.SIGKILL
        COUNTS["kills"] += 1
        small_run(half)
        assert outcome(half) == expected

    def test_many_at_once_are_one(self, tmp_path, expected):
        children = [fork(lambda: small_run(tmp_path / "run"), tmp_path / f"log{i}") for i in range(4)]
        codes = [wait(child) for child in children]
        assert set(codes) <= {0, 2}  # the late ones may find it finished
        assert 0 in codes
        assert outcome(tmp_path / "run") == expected
        for i, code in enumerate(codes):
            if code:
                one_line(tmp_path / f"log{i}", "is at work in")


def test_everything_written_is_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    small_run(tmp_path)
    n_files = 3 * (3 + 1) * 2  # a checkpoint and epochs.jsonl, at each epoch and each task's end
    assert len(flushed) >= n_files


def test_the_lines_of_a_run_do_not_depend_on_being_traced(tmp_path, expected):
    with stoppable(), lines_traced(lambda _: None):
        small_run(tmp_path / "traced")
    assert outcome(tmp_path / "traced") == expected
    assert torch.tensor(expected["accuracy"][-1]).std() > 0  # and there is something to compare
