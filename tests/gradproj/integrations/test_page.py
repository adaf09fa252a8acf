"""docs/integrations.md does what it says: its code is run."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from gradproj import GradientProjectionMemory
from tests import ROOT
from tests.gradproj.integrations.small import assert_open

BLOCKS = re.findall(
    r"^## ([^\n]*)\n[^#]*?```python\n(.*?)```", (ROOT / "docs" / "integrations.md").read_text("utf-8"), re.M | re.S
)


def run(title: str, **names: Any) -> GradientProjectionMemory:
    """The memory that a section's code leaves."""
    exec(dict(BLOCKS)[title], names)
    return names["memory"]


def test_each_section_has_one():
    assert [title for title, _ in BLOCKS] == ["Lightning", "Hugging Face", "Avalanche"]


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_lightning(tmp_path, monkeypatch):
    pytest.importorskip("lightning.pytorch", reason="Lightning is not installed")
    from tests.gradproj.integrations.test_lightning import Module, loader

    monkeypatch.chdir(tmp_path)  # Lightning writes logs
    module = Module()
    memory = run("Lightning", module=module, tasks=[loader(0), loader(1)])
    assert memory.n_updates == 2
    assert_open(module)


@pytest.mark.filterwarnings("ignore:.*pin_memory.*no accelerator")
def test_hugging_face(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="peft is not installed")
    from tests.gradproj.integrations.test_huggingface import llama, texts

    monkeypatch.chdir(tmp_path)
    model = llama()
    assert run("Hugging Face", model=model, tasks=[texts(0), texts(1)]).n_updates == 2
    assert_open(model)


@pytest.mark.filterwarnings("ignore:No loggers specified")
def test_avalanche(tmp_path, monkeypatch):
    pytest.importorskip("avalanche", reason="Avalanche is not installed")
    from tests.gradproj.integrations.test_avalanche import ManyHeads, stream

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = ManyHeads()
    assert run("Avalanche", model=model, stream=stream()).n_updates == 2
    assert_open(model)
