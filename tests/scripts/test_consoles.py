"""Consoles that lack characters, paths from where the user stands, help that installs nothing."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from engine.interrupts import Stopped, stoppable
from report import __main__ as report
from sweep import __main__ as sweep
from tests import ROOT

pytestmark = pytest.mark.slow


def python(*arguments, encoding="ascii", cwd=ROOT):
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
    environment |= {"MPLBACKEND": "agg", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True)
    text = (done.stdout + done.stderr).decode(encoding)
    assert "Traceback" not in text, text
    return done.returncode, text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
@pytest.mark.parametrize(
    "command",
    [
        ["main_pmnist.py", "--help"],
        ["main_custom.py", "--help"],
        ["-m", "sweep", "--help"],
        ["-m", "report", "--help"],
        ["-m", "report", str(ROOT / "results" / "real" / "pmnist" / "gpm")],
        ["-m", "report", str(ROOT / "results" / "real" / "pmnist" / "gpm"), "--format", "markdown"],
        ["benchmarks/speed.py", "--no_run"],
    ],
    ids=" ".join,
)
def test_help_and_tables(command, encoding):
    code, text = python(*command, encoding=encoding)
    assert code == 0
    assert len(text) > 100


def test_errors_and_a_run_with_names_that_the_console_lacks(tmp_path):
    """Called from a program of the user's own, which prepares no console."""
    program = tmp_path / "mine.py"
    program.write_text(
        """
from dataclasses import replace
from pathlib import Path
from tests import tiny
tasks = [replace(task, name=f"Ω {task.name}", classes=["α", "β", "γ"]) for task in tiny.benchmark(2).tasks]
options = tiny.options(Path("out"), n_tasks=2, n_epochs=1, quiet=False)
tiny.run(options, replace(tiny.benchmark(), tasks=tasks), tiny.Network(2))
""",
        encoding="utf-8",
    )
    code, text = python(str(program), cwd=tmp_path)
    assert code == 0, text
    assert "task 1/2 (? clusters 0) learned" in text
    code, text = python(str(ROOT / "main_pmnist.py"), "--samples", "ä:3", cwd=tmp_path)
    assert code == 2
    code, text = python("-m", "report", "nö", "out", cwd=tmp_path)
    assert code == 1  # one of the paths is not there; the table of the others is
    assert "missing: n" in text


@pytest.mark.parametrize(
    "command", [["main_pmnist.py", "--n_epoch", "3"], ["-m", "report", "results", "--form", "csv"]]
)
def test_abbreviations_are_refused(command):
    code, text = python(*command)
    assert code == 2
    assert "unrecognized arguments" in text


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--samples", "conv1:24", "argument --samples: 'conv1:24' is not of the form LAYER=COUNT"),
        ("--n_samples", "many", "argument --n_samples: 'many' is neither a count nor 'all'"),
        ("--lr", "fast", "argument --lr: invalid float value: 'fast'"),
    ],
)
def test_values_that_cannot_be_converted(flag, value, message):
    code, text = python("main_cifar100.py", flag, value)
    assert code == 2
    assert message in text
    assert text.count("\n") == 1


def clone_without_python(folder: Path) -> tuple[Path, dict[str, str]]:
    """A clone, and an environment whose Python lacks what the experiments need."""
    clone = folder / "clone"
    names = shutil.ignore_patterns(".git", "runs", "data", ".venv", "__pycache__")
    shutil.copytree(ROOT, clone, ignore=names)
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys._base_executable} -I "$@"\n')
    python.chmod(0o755)
    return clone, {"PATH": f"{folder / 'bin'}:/usr/bin:/bin", "HOME": str(folder)}


def test_help_installs_nothing(tmp_path):
    clone, environment = clone_without_python(tmp_path)
    command = ["bash", str(clone / "run_experiments.sh"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "Many runs from one command" in done.stdout
    assert not (clone / ".venv").exists()


def test_paths_are_taken_from_where_the_user_stands(tmp_path):
    arguments = "--only pmnist --methods naive --n_tasks 1 --n_epochs 1 --n_train 3 --data_dir images --output_dir out"
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MPLBACKEND": "agg"}
    command = ["bash", str(ROOT / "run_experiments.sh"), *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "images" / "mnist_embedded").is_dir() or list((tmp_path / "images").iterdir())
    assert list((tmp_path / "out").rglob("summary.json"))


def test_a_pipe_that_nobody_reads_does_not_end_a_run(tmp_path):
    """The run is finished all the same, and says nothing of it."""
    flags = "--data embedded --n_tasks 2 --n_train 20 --n_epochs 1 --lr 0.05 --device cpu"
    for i, to in enumerate(("| head -1", "> /dev/full")):
        command = f"{sys.executable} main_pmnist.py {flags} --output_dir {tmp_path / str(i)} {to}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
        assert done.stderr == ""
        assert len(list((tmp_path / str(i)).rglob("summary.json"))) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no terminals that hang up")
@pytest.mark.parametrize("ignored", [False, True], ids=["plain", "nohup"])
def test_a_terminal_that_hangs_up(ignored):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        with nullcontext() if ignored else pytest.raises(Stopped), stoppable():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is (signal.SIG_IGN if ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("main", [report.main, sweep.main])
def test_what_the_system_refuses_is_one_line(main, monkeypatch, capsys):
    def closed(*_, **__):
        raise PermissionError(13, "Permission denied", "/closed")

    monkeypatch.setattr("report.__main__.find_runs", closed)
    monkeypatch.setattr("sweep.__main__.make_jobs", closed)
    assert main(["runs"] if main is report.main else []) == 2
    assert capsys.readouterr().err.endswith("error: /closed: Permission denied; give another place\n")
