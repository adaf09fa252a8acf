"""One run: its tasks one after another, its folder, and the two contracts Task and Method."""

from engine.loading import load_run

__all__ = ["load_run"]
