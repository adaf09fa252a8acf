"""Summaries of runs, written for tests of the report."""

from __future__ import annotations

import json

from report import rows as comparison
from report import runs as summaries


def summary(**changes):
    """The summary of a two-task run on complete real data: ACC 80, BWT -10."""
    return {
        "benchmark": "cifar100",
        "method": "gpm",
        "variant": "default",
        "seed": 1,
        "protocol": "paper",
        "data": {"kind": "real", "sources": {"cifar100": {"train_sha256": "a", "verified": True}}, "notes": []},
        "average_accuracy": 80.0,
        "backward_transfer": -10.0,
        "accuracy": [[90.0, None], [80.0, 80.0]],
        "memory_columns": {"conv1": [3, 5]},
        "memory_input_sizes": {"conv1": 48},
        "seconds": {"total": 60.0},
        "hyperparameters": {"n_epochs": 20, "data_dir": "/home/me/data", "output_dir": "/home/me/runs", "quiet": True},
        "device": "Intel(R) Xeon(R) Processor, 1 thread(s)",
        "finished": True,
    } | changes


def write(folder, **changes):
    """A run folder; returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"hyperparameters": {"n_tasks": 2}}')
    (folder / "summary.json").write_text(json.dumps(summary(**changes)))
    return folder


def rows_of(*paths):
    runs, _ = summaries.find_runs(paths)
    return comparison.summarise(runs)
