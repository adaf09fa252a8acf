"""docs/your_own_method.md does what it says: its files are written down and its commands run."""

import json
import os
import re
import subprocess
import sys

from engine.method import Method
from tests import ROOT

PAGE = ROOT / "docs" / "your_own_method.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(), flags=re.MULTILINE | re.DOTALL)


def test_page(tmp_path):
    for block in blocks("python"):
        name = re.match(r"# (\w+\.py)\n", block)
        assert name, f"a block does not begin with its file name:\n{block}"
        (tmp_path / name[1]).write_text(block)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error::UserWarning"}
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert [command.split()[1] for command in commands] == ["main_lwf.py", "main_lwf.py", "-m", "-m"]
    for command in commands:
        arguments = command.removeprefix("python ").split()
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    summaries = [json.loads(path.read_text()) for path in sorted(tmp_path.rglob("summary.json"))]
    transfer = {summary["method"]: summary["backward_transfer"] for summary in summaries}
    assert transfer["lwf"] > transfer["naive"]


def test_the_method_is_short():
    (method,) = [block for block in blocks("python") if block.startswith("# lwf.py")]
    assert len(method.splitlines()) <= 60


def test_the_tables_are_the_contract():
    """What the page lists is what the class has: every attribute that it declares, and every moment."""
    page = PAGE.read_text()
    declared = [name for name, kind in Method.__annotations__.items() if "ClassVar" in kind]
    assert [name for name in declared if f"`{name}`" not in page] == []
    listed = {name for line in page.splitlines() if line.startswith("| `") for name in re.findall(r"`(\w+)\(", line)}
    assert {name for name in listed if not callable(getattr(Method, name, None))} == set()
    helpers = {"memory_floats", "state_dict", "load_state_dict", "weights", "load_weights", "precision", "trainable"}
    helpers |= {"shared_layers", "frozen_normalization"}
    public = {name for name in vars(Method) if callable(getattr(Method, name)) and not name.startswith("_")}
    assert public - helpers == listed
