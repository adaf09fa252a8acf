"""Naive fine-tuning: each task as if there had been none before it, the lower bound."""

from engine.method import Method


class Naive(Method):
    """Plain SGD on one task after another. Stores nothing."""

    name, title, place = "naive", "naive", 1
    plain_step = True
