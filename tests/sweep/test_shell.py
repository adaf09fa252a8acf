"""The shell scripts, and how they set up a machine."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests import ROOT

SCRIPTS = ("run_experiments.sh", "run_tests.sh", ".ci/run", ".ci/environment.sh")


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_help_says_it_all(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    for script, words in {
        "run_experiments.sh": ("paper", "--seeds", "--only", "--jobs", "--table", "embedded"),
        "run_tests.sh": ("pytest", "ruff"),
    }.items():
        # From another folder: the scripts find their own.
        done = subprocess.run(
            ["bash", ROOT / script, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert all(word in done.stdout for word in words)


# Stands for an interpreter: answers what the set-up asks and notes what it is told to install.
STUB = """#!/bin/bash
case "$*" in
  "- "*) cat >/dev/null; [ -e "$STATE/complete" ] || cat "$STATE/lacking" ;;
  *version_info*) exit 0 ;;
  *base_prefix*) [ -e "$STATE/venv_active" ] ;;
  *find_spec*) [ -e "$STATE/has_torch" ] ;;
  *"-m venv"*) echo "venv $*" >>"$STATE/log"; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"pip install"*) echo "install $0" >>"$STATE/log"
      while [ $# -gt 0 ]; do [ "$1" = --requirement ] && cat "$2" >>"$STATE/log"; shift; done
      [ -e "$STATE/offline" ] && exit 1
      touch "$STATE/complete" ;;
  *metadata*) echo "torch==2.4.1+cu121" ;;
  *sys.prefix*) echo somewhere ;;
esac
"""


@pytest.fixture
def set_up(tmp_path):
    """Calls prepare_python with a stub interpreter; returns (exit code, output, what the stub noted)."""
    stub, state = tmp_path / "python-stub", tmp_path / "state"
    stub.write_text(STUB)
    stub.chmod(0o755)
    state.mkdir()
    (state / "lacking").write_text("tqdm>=4\n")

    def call(*facts):
        for fact in facts:
            (state / fact).touch()
        program = f'source "{ROOT}/.ci/environment.sh"; prepare_python requirements.txt; echo "$python"'
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(stub), "STATE": str(state)}
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        log = (state / "log").read_text() if (state / "log").exists() else ""
        return done.returncode, done.stdout.strip(), log

    call.stub = str(stub)
    return call


def test_a_complete_interpreter_is_used_as_it_is(set_up, tmp_path):
    assert set_up("complete") == (0, set_up.stub, "")
    assert not (tmp_path / ".venv").exists()


def test_a_bare_interpreter_gets_a_virtual_environment_with_what_is_missing(set_up):
    code, python, log = set_up()
    assert (code, python) == (0, ".venv/bin/python")
    assert log.splitlines() == ["venv -m venv --clear .venv", "install .venv/bin/python", "tqdm>=4"]
    assert set_up()[2] == log  # nothing more the second time


def test_the_machines_own_torch_is_shared_not_installed_again(set_up):
    assert "--system-site-packages" in set_up("has_torch")[2]


def test_an_active_virtual_environment_is_completed(set_up, tmp_path):
    code, python, log = set_up("venv_active")
    assert (code, python) == (0, set_up.stub)
    assert log.splitlines() == [f"install {set_up.stub}", "tqdm>=4"] and not (tmp_path / ".venv").exists()


def test_a_failed_installation_ends_with_code_2_and_is_tried_again(set_up, tmp_path):
    assert set_up("offline")[0] == 2
    (tmp_path / "state/offline").unlink()
    assert set_up()[:2] == (0, ".venv/bin/python")


def test_missing_requirements_are_found_by_module_name(tmp_path):
    (tmp_path / "base.txt").write_text("pillow>=9  # PIL\nno_such_module==1.0\n")
    (tmp_path / "dev.txt").write_text("-r base.txt\nnumpy<3\nabsent-too\n")
    program = f'source "{ROOT}/.ci/environment.sh"; missing_requirements "{sys.executable}" "{tmp_path}/dev.txt"'
    done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["no_such_module==1.0", "absent-too"]


def test_no_python_is_said_in_one_line(tmp_path):
    for name in ("dirname", "env"):
        (tmp_path / name).symlink_to(f"/usr/bin/{name}")
    done = subprocess.run(
        ["/bin/bash", str(ROOT / "run_experiments.sh")], env={"PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Python 3.10" in done.stderr


def test_both_lists_of_requirements_name_the_same_packages():
    declared = set(re.findall(r'"([a-z]+)>=', (ROOT / "pyproject.toml").read_text()))
    lines = [(ROOT / name).read_text() for name in ("requirements.txt", "requirements-dev.txt")]
    listed = set(re.findall(r"^([a-z]+)[=>]", "\n".join(lines), re.MULTILINE))
    assert listed == declared - {"setuptools", "tensorboard", "pdoc"}
