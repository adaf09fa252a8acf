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

from gpm.cluster import Cluster

ROOT = Path(__file__).resolve().parent.parent

# A run that says who its worker is, and takes long only the first time that it is tried.
FAKE = """
import os, pathlib, time
folder = pathlib.Path({folder!r}, {name!r})
folder.mkdir(parents=True, exist_ok=True)
first = not (folder / "worker").exists()
(folder / "worker").write_text(str(os.getppid()))
time.sleep({seconds} if first else 0)
(folder / "tries").write_text("one" if first else "two")
print("ACC 90.00 %\\n  " + str(folder) + "/summary.json, accuracy.csv")
"""

DRIVER = """
import json, pathlib, sys
from gpm import cluster, jobs
folder = pathlib.Path(sys.argv[1])
codes = json.loads(sys.argv[2])
plan = [jobs.Job(name, (sys.executable, "-c", code), folder / "logs" / name) for name, code in codes.items()]
machines = cluster.Cluster("local", pathlib.Path.cwd(), cpus=1, gpus=0)
outcome = jobs.run_jobs(plan, machines.n_at_once, 1, machines)
machines.close()
print("folders", sorted(path.name for path in outcome.folders), "failed", [job.name for job in outcome.failed])
"""


@pytest.mark.slow
def test_a_run_whose_worker_is_killed_is_tried_again(tmp_path):
    pytest.importorskip("ray")
    seconds = {"killed": 120, "other": 1, "third": 0}
    codes = {name: FAKE.format(folder=str(tmp_path), name=name, seconds=s) for name, s in seconds.items()}
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path), json.dumps(codes)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
    )
    try:
        worker = tmp_path / "killed/worker"
        deadline = time.monotonic() + 100
        while not (worker.exists() and worker.read_text()):
            assert time.monotonic() < deadline and driver.poll() is None, driver.communicate(timeout=10)
            time.sleep(0.1)
        os.kill(int(worker.read_text()), signal.SIGKILL)
        said, errors = driver.communicate(timeout=100)
    finally:
        driver.kill()
    assert "folders ['killed', 'other', 'third'] failed []" in said, said + errors
    assert (tmp_path / "killed/tries").read_text() == "two"
    assert (tmp_path / "other/tries").read_text() == "one"


@pytest.mark.parametrize(("have", "asked", "n_at_once"), [(0, None, 16), (2, None, 8), (2, 1, 2), (2, 0, 16)])
def test_small_runs_share_a_gpu(monkeypatch, have, asked, n_at_once):
    resources = {"CPU": 16, "GPU": have}
    ray = SimpleNamespace(init=lambda **_: None, cluster_resources=lambda: resources)
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert Cluster("auto", ROOT, 1, asked).n_at_once == n_at_once


def test_ray_that_is_not_there_is_one_line(tmp_path):
    code = "import sys; sys.modules['ray'] = None; from gpm import sweep; sys.exit(sweep.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "--only", "pmnist", "--ray", "local", "--output_dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stderr == (
        "run_experiments.sh: error: --ray needs a package that is not here: pip install -e '.[cluster]'\n"
    )
