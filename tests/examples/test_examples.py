"""Each example runs, says what is forgotten without and with protection, and that the guarantee holds."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

from tests import ROOT

NEEDS = {"resnet18": ["torchvision"], "language_model": ["transformers", "peft"], "avalanche_digits": ["avalanche"]}


def test_all_are_known():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {*NEEDS, "beforehand"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NEEDS)
def test_example(name, tmp_path):
    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} is not installed")
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--short"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("naive ") for line in lines) and any(line.startswith("protected ") for line in lines)
    assert lines[-1].startswith("the guarantee holds")
