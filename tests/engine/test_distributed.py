"""`torchrun` starts one run of several processes: that of one process, to rounding."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from engine import distributed
from engine.folder import load_checkpoint
from tests import ROOT, tiny
from tests.processes import SECONDS, environment
from tests.tiny import run_folder

pytestmark = pytest.mark.slow
TINY = "--data embedded --n_tasks 2 --n_train 40 --n_epochs 3 --lr 0.05 --batch_size_train 9".split()


def torchrun(script: str, *arguments: str, n: int = 2) -> subprocess.Popen:
    """Start a script of the project in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), script]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *arguments], cwd=ROOT, env=environment(), start_new_session=True, **pipes)


def ended(process: subprocess.Popen) -> subprocess.CompletedProcess:
    """Wait for it; whatever is left of its group is killed when time is up."""
    try:
        out, err = process.communicate(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def alone(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, script, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=SECONDS)


def summary(folder: Path) -> dict:
    return json.loads((run_folder(folder) / "summary.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    assert alone("main_pmnist.py", *TINY, "--output_dir", str(folder)).returncode == 0
    return folder


def test_two_processes_are_one_run_and_equal_one(one, tmp_path):
    done = ended(torchrun("main_pmnist.py", *TINY, "--output_dir", str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ACC") == 1
    assert ", 2 processes, folder" in done.stdout
    assert summary(tmp_path)["device"] == f"{summary(one)['device']}, 2 processes"
    assert "numbers differ" not in done.stdout
    assert summary(tmp_path)["accuracy"] == summary(one)["accuracy"]
    assert summary(tmp_path)["accuracy"][-1][-1] > 20  # of ten classes: it learned
    assert summary(tmp_path)["memory_columns"] == summary(one)["memory_columns"]
    weights = [load_checkpoint(run_folder(folder))["model"] for folder in (tmp_path, one)]
    torch.testing.assert_close(*weights, atol=1e-5, rtol=1e-4)


def test_a_killed_process_ends_the_run_which_goes_on_in_one(one, tmp_path):
    # Many epochs, so that there is time to kill it in; what is left then goes on in one process.
    arguments = [*TINY[:6], "--n_epochs", "400", "--output_dir", str(tmp_path)]
    process = torchrun("main_pmnist.py", *arguments)
    try:
        began = time.monotonic()
        while not list(tmp_path.rglob("epochs.jsonl")) or not run_folder(tmp_path).joinpath("epochs.jsonl").read_text():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() - began < SECONDS
            time.sleep(0.05)
        follower = next(pid for pid in children(process.pid) if b"RANK=1" in environment_of(pid))
        os.kill(follower, signal.SIGKILL)
        done = ended(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert done.returncode != 0
    assert "the same command continues from" in done.stdout
    state = load_checkpoint(run_folder(tmp_path))
    assert state["epochs"]
    done = alone("main_pmnist.py", *arguments[:-4], "--n_epochs", "400", "--n_tasks", "1", *arguments[-2:])
    assert done.returncode == 0


def children(pid: int) -> list[int]:
    found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True)
    return [int(line) for line in found.stdout.split()]


def environment_of(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def test_what_cannot_be_shared_is_refused_once(tmp_path):
    done = ended(torchrun("main_pmnist.py", *TINY, "--method", "ewc", "--output_dir", str(tmp_path)))
    assert done.returncode != 0
    assert len(re.findall("main_pmnist.py: error: method ewc cannot be run by 2 processes", done.stderr)) == 1
    assert not list(tmp_path.iterdir())


def test_shares_of_a_batch(monkeypatch):
    """They cover it, and their means weighted are its mean; a batch with too few images is whole everywhere."""
    monkeypatch.setattr(distributed, "n_processes", lambda: 3)
    for n in (2, 5, 6, 10, 64):
        shares = []
        for rank in range(3):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            shares.append(distributed.share_of(n))
        images = torch.arange(float(n)).square()
        total = sum(weight * images[start:stop].mean() for start, stop, weight in shares)
        torch.testing.assert_close(total, images.mean())
        assert min(stop - start for start, stop, _ in shares) >= 2
        assert n < 6 or [start for start, _, _ in shares] == [0, *(stop for _, stop, _ in shares[:-1])]


def test_what_differs_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "differences", lambda model: ["dropout drew other units"])
    summary = tiny.run(tiny.options(tmp_path), tiny.benchmark(), tiny.Network())
    assert summary["data"]["notes"] == ["made up", "dropout drew other units"]


def test_what_differs_is_said(monkeypatch):
    assert distributed.differences(nn.BatchNorm1d(2)) == []
    monkeypatch.setattr(distributed, "is_shared", lambda: True)
    monkeypatch.setattr(distributed, "n_processes", lambda: 2)
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.5), nn.Dropout(0.0))
    assert [note.split()[0] for note in distributed.differences(network)] == ["BatchNorm", "dropout"]
    assert distributed.differences(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0))) == []
