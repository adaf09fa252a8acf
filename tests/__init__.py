"""Tests, and the slow, obvious implementation that they compare with (reference.py)."""
