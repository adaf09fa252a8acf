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


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Stopwatch:
    """Times calls on a device.

    Args:
        device: waited for before and after a call.
        clock: "wall"; or "cpu", processor time, which on a busy machine and with one thread is what an idle one needs.
    """

    device: torch.device
    clock: str = "wall"

    def __call__(self, function: Callable[[], object]) -> float:
        """Seconds that one call takes."""
        read = CLOCKS[self.clock]
        self.wait()
        began = read()
        function()
        self.wait()
        return read() - began

    def wait(self) -> None:
        """Until the device has finished what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def interleaved(variants: Mapping[str, Callable[[], object]], rounds: int, stopwatch: Stopwatch) -> dict[str, list]:
    """Seconds of each variant in each round; every other round goes backwards, so that no one always comes first."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(rounds):
        for name in variants if i % 2 == 0 else reversed(variants):
            times[name].append(stopwatch(variants[name]))
    return times


def ratios(times: Mapping[str, list[float]], of: str, to: str) -> Spread:
    """The spread of one variant's time over another's, round by round."""
    return Spread.of([a / b for a, b in zip(times[of], times[to], strict=True)])


def matrix_product_rate(stopwatch: Stopwatch, repetitions: int = 7) -> float:
    """Operations a second of a large float32 matrix product, the fastest of some, with the threads now set."""
    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE, device=stopwatch.device)
    stopwatch(lambda: torch.mm(a, b))
    fastest = min(stopwatch(lambda: torch.mm(a, b)) for _ in range(repetitions))
    return 2 * MATRIX_SIZE**3 / fastest
