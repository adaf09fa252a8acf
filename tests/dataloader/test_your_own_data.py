"""docs/your_own_data.md does what it says: its files are written down and its commands run, in their order."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloader.embedded import render as embedded
from tests import ROOT

PAGE = (ROOT / "docs" / "your_own_data.md").read_text(encoding="utf-8")
NAMES = ("zero", "one", "two", "three", "four")


def glyphs(monkeypatch, folder: Path):
    """Rendered digits, a few of each."""
    monkeypatch.setitem(embedded.RECIPES, "mnist", embedded.RECIPES["mnist"]._replace(n_train=12, n_test=6))
    return embedded.load_raw("mnist", folder)


def write_pictures(raw, folder: Path) -> None:
    """PNG files in a folder for each class, in folders train and test."""
    for part in ("train", "test"):
        images, labels = getattr(raw, f"{part}_images"), getattr(raw, f"{part}_labels")
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            if label < len(NAMES):
                path = folder / part / NAMES[label] / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)


def write_mnist(raw, folder: Path) -> None:
    """MNIST's published files, with the images of another set."""
    folder.mkdir(parents=True)
    for part, name in (("train", "train"), ("test", "t10k")):
        for kind, of in (("images-idx3", "images"), ("labels-idx1", "labels")):
            array = np.asarray(getattr(raw, f"{part}_{of}"), dtype=np.uint8)
            sizes = np.array(array.shape, dtype=">i4").tobytes()
            (folder / f"{name}-{kind}-ubyte").write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())


@pytest.mark.slow
def test_page(tmp_path, monkeypatch):
    raw = glyphs(monkeypatch, tmp_path / "embedded")
    write_pictures(raw, tmp_path / "pictures")
    write_mnist(raw, tmp_path / "data" / "MNIST" / "raw")
    shutil.copy(ROOT / "main_custom.py", tmp_path)
    said = {}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    for kind, block in blocks:
        if kind != "bash":
            name, text = re.match(r"# ([\w.]+)\n(.*)", block, flags=re.DOTALL).groups()
            (tmp_path / name).write_text(text, encoding="utf-8")
    for command in "".join(block for kind, block in blocks if kind == "bash").splitlines():
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said[command] = done.stdout
    (named,) = [text for command, text in said.items() if "classify.py" in command]
    assert len(named.splitlines()) > 1 and all(line.split(".png ")[1] in NAMES[:2] for line in named.splitlines())
    (table,) = [text for command, text in said.items() if "report" in command]
    assert all(name in table for name in ("GPM", "naive", "ER-Res", "from_tensors", "from_torchvision", "from_stream"))
    assert "continued from" in said["python my_run.py --source rotated_mnist --one_head --n_tasks 3"]
    tasks = {
        path.parents[3].name: [task["classes"] for task in json.loads(path.read_text())["tasks"]]
        for path in (tmp_path / "runs" / "real").rglob("summary.json")
    }
    assert tasks["from_folder"] == [["zero", "one"], ["two", "three", "four"]]
    assert tasks["from_torchvision"] == tasks["from_stream"] == [[0, 1], [2, 3, 4]]
    assert tasks["from_tensors"] == [[0, 1], [2, 3, 4, 5]]
    assert (tmp_path / "runs" / "mine" / "weights-0.pt").exists()
