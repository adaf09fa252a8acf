"""Timing that holds up on a noisy machine: variants take turns in one process, ratios are taken turn by turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

MATRIX_SIZE = 2048  # of the product that measures the arithmetic rate


@dataclass(frozen=True)
class Spread:
    """The median and the quartiles of some measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def synchronize(device: torch.device) -> None:
    """Wait for the device to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """How long one call takes."""
    synchronize(device)
    began = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - began


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list]:
    """Seconds of each variant in each round; every other round goes backwards, so that no one always comes first."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        for name in variants if i % 2 == 0 else reversed(variants):
            times[name].append(seconds(variants[name], device))
    return times


def ratios(times: Mapping[str, list[float]], of: str, to: str) -> Spread:
    """The spread of one variant's time over another's, round by round."""
    return Spread.of([a / b for a, b in zip(times[of], times[to], strict=True)])


def matrix_product_rate(device: torch.device, repetitions: int = 7) -> float:
    """Floating-point operations a second of a large float32 matrix product: the fastest of some, with today's threads."""
    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=device)
    seconds(lambda: torch.mm(a, b), device)
    fastest = min(seconds(lambda: torch.mm(a, b), device) for _ in range(repetitions))
    return 2 * MATRIX_SIZE**3 / fastest
