"""A sweep on a local Ray cluster of two workers, one of them killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sweep.cluster import Cluster
from tests import ROOT
from tests.faults import process_list

DRIVER = """
import json, pathlib, sys
from sweep import cluster, jobs
folder = pathlib.Path(sys.argv[1])
plan = [
    jobs.Job(name, tuple(command), folder / "logs" / name, folder / name, {"method": "gpm", "n_tasks": 3}, n_epochs=8)
    for name, command in json.loads(sys.argv[2]).items()
]
machines = cluster.Cluster("local", pathlib.Path.cwd(), cpus=1, gpus=0)
outcome = jobs.run_jobs(plan, 2, 1, machines)
machines.close()
print("folders", sorted(path.name for path in outcome.folders), "failed", [job.name for job in outcome.failed])
"""


def worker_of(folder: Path) -> int:
    """The process that started the run in a folder."""
    run = f"main_pmnist.py --run_folder {folder} "
    (parent,) = [line.split()[0] for line in process_list().splitlines() if run in line]
    return int(parent)


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_goes_on_from_its_checkpoint(tmp_path):
    pytest.importorskip("ray")

    def command(name: str) -> list[str]:
        flags = "--data embedded --n_tasks 3 --n_train 50 --n_epochs 8 --device cpu --step eager".split()
        return [sys.executable, "-u", "main_pmnist.py", "--run_folder", str(tmp_path / name), *flags]

    driver = subprocess.Popen(
        [
            sys.executable,
            "-c",
            DRIVER,
            str(tmp_path),
            json.dumps({name: command(name) for name in ("killed", "other")}),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    try:
        log = tmp_path / "logs/killed"
        deadline = time.monotonic() + 300  # Ray may take a minute to start on a busy machine
        while not (log.exists() and "learned" in log.read_text()):
            assert time.monotonic() < deadline and driver.poll() is None, driver.communicate(timeout=10)
            time.sleep(0.05)
        os.kill(worker_of(tmp_path / "killed"), signal.SIGKILL)
        said, errors = driver.communicate(timeout=300)
    finally:
        driver.kill()
    assert "folders ['killed', 'other'] failed []" in said, said + errors
    assert "continued from its checkpoint at task 2/3" in log.read_text()
    assert "continued" not in (tmp_path / "logs/other").read_text()
    assert (tmp_path / "killed/accuracy.csv").read_text() == (tmp_path / "other/accuracy.csv").read_text()


@pytest.mark.parametrize(("have", "asked", "n_at_once"), [(0, None, 16), (2, None, 8), (2, 1, 2), (2, 0, 16)])
def test_small_runs_share_a_gpu(monkeypatch, have, asked, n_at_once):
    resources = {"CPU": 16, "GPU": have}
    ray = SimpleNamespace(init=lambda **_: None, cluster_resources=lambda: resources)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert Cluster("auto", ROOT, 1, asked).n_at_once == n_at_once


def test_ray_that_is_not_there_is_one_line(tmp_path):
    code = (
        "import sys; sys.modules['ray'] = None; from sweep import __main__ as sweep; sys.exit(sweep.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "--only", "pmnist", "--ray", "local", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == (
        "run_experiments.sh: error: --ray needs a package that is not here: pip install -e '.[cluster]'\n"
    )
