"""Who may import whom, and that the library stands alone."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

ROOMS = ("gradproj", "models", "engine", "dataloader", "methods", "report", "sweep", "benchmarks")
MAY_IMPORT = {
    "gradproj": (),
    "models": ("engine", "gradproj"),
    "engine": ("gradproj",),
    "dataloader": ("engine", "gradproj"),
    "methods": ("engine", "gradproj"),
    "report": ("engine", "gradproj"),
    "main_*": ("dataloader", "methods", "report", "models", "engine", "gradproj"),
}
FROM_OUTSIDE = {"gradproj": {"torch", "numpy"}, "models": {"torch", "numpy", "timm"}}
INTEGRATED = {"lightning.py": "lightning", "huggingface.py": "transformers", "avalanche.py": "avalanche"}


def imported(file: Path) -> set[str]:
    """The packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: relative import"
            found.add(node.module.partition(".")[0])
    return found


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_arrows_point_downwards(room):
    files = sorted(ROOT.glob(f"{room}.py")) or sorted((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        packages = imported(file)
        scripts = {name for name in packages if name.startswith("main_")}
        assert packages & {*ROOMS, "tests"} <= {room, *MAY_IMPORT[room]}, file
        assert not scripts, file
        if room in FROM_OUTSIDE:
            outside = packages - set(sys.stdlib_module_names) - set(ROOMS)
            own = {INTEGRATED.get(file.name)} if file.parent.name == "integrations" else set()
            assert outside <= FROM_OUTSIDE[room] | own, file


def test_every_package_is_a_room():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages | {"benchmarks"} == {*ROOMS, "tests"}


def test_the_library_loads_nothing_of_the_project_beside_itself():
    code = "import sys, gradproj; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert {*ROOMS, "tests", "filelock", "scipy", "matplotlib", *INTEGRATED.values()} & set(done.stdout.split()) == {
        "gradproj"
    }


def test_the_compiler_is_not_loaded_before_it_is_needed():
    """It takes as long to import as the rest of torch."""
    code = "import sys, torch; before = set(sys.modules); import report.__main__; print(*set(sys.modules) - before)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch._dynamo" not in done.stdout.split()


@pytest.mark.slow
def test_the_wheel_is_the_library_alone_and_works_elsewhere(tmp_path):
    """Built from the tree without the network, put on the path of an environment that has torch and numpy only."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "gradproj", source / "gradproj", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "wheel --quiet --no-deps --no-build-isolation --wheel-dir".split()
    command = [sys.executable, "-m", "pip", *build, str(tmp_path), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("gradproj-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"gradproj"}
    assert {"gradproj/py.typed", "gradproj/layers/linear.py", "gradproj/integrations/lightning.py"} <= set(names)
    assert f"-{version()}-" in wheel.name
    venv.create(tmp_path / "venv", with_pip=False)
    python = next(p for p in (tmp_path / "venv/bin/python", tmp_path / "venv/Scripts/python.exe") if p.exists())
    program = f"""
import sys
sys.path[:0] = [{str(tmp_path / "installed")!r}]
sys.path += {[path for path in sys.path if "site-packages" in path]!r}
import torch
from gradproj import GradientProjectionMemory, InputError
model = torch.nn.Linear(3, 2)
memory = GradientProjectionMemory(model)
memory.update(model, [torch.eye(3)], 0.9)
with memory.protect():
    model(torch.ones(1, 3)).sum().backward()
print(memory.columns, sys.modules["gradproj"].__file__)
"""
    done = subprocess.run([str(python), "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "installed") in done.stdout


def version() -> str:
    import gradproj

    return gradproj.__version__


def test_the_changelog_begins_with_this_version():
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == f"## {version()}"
