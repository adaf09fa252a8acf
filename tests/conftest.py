"""What the tests share: quick runs, and the closing lines of the suite."""

import os
from pathlib import Path

import pytest

from engine import experiment, hardware


@pytest.fixture(scope="session")
def real_data_dir() -> Path:
    """The folder with the real images; a test that asks for it is skipped where there is none."""
    folder = Path(os.environ.get("GPM_DATA_DIR", "data"))
    missing = [
        n for n in ("mnist", "fashion_mnist", "notmnist", "cifar100") if not (folder / n / "test_labels.npy").is_file()
    ]
    if missing:
        pytest.skip(f"no real images of {', '.join(missing)} in {folder}; set GPM_DATA_DIR")
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Runs save at each epoch boundary, and wait neither for the disk nor for git."""
    monkeypatch.setattr(experiment, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(hardware, "commit", lambda: "0000")
    monkeypatch.setattr(os, "fsync", lambda _: None)  # it matters when the power fails, not when a process is killed


def pytest_terminal_summary(terminalreporter):
    """How far old outputs moved, and how much was survived."""
    from tests.faults import COUNTS
    from tests.gradproj.layers.case import DRIFT, drift_table

    if DRIFT:
        terminalreporter.write_line("the most that old outputs moved, of themselves, while new tasks were learned:")
        terminalreporter.write_line(drift_table())
    if COUNTS:
        terminalreporter.write_line("survived: " + ", ".join(f"{n} {what}" for what, n in sorted(COUNTS.items())))
