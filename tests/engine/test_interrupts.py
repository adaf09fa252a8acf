"""SIGTERM and SIGINT: the run stops with its state kept, whatever it was doing, and goes on to the same numbers."""

import os
import random
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from engine import interrupts
from engine.interrupts import Stopped, deferred, stoppable
from gradproj.errors import InputError
from methods import METHODS
from tests.faults import (
    COUNTS,
    Normalised,
    fork,
    moments,
    outcome,
    signal_later,
    signalled_at,
    small_run,
    trace,
)

pytestmark = pytest.mark.usefixtures("quick")

BOTH = pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])


def raise_signal(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


@BOTH
def test_signal_raises_stopped_with_the_exit_code(number, code):
    with pytest.raises(Stopped, match=f"signal {number:d}") as caught, stoppable():
        raise_signal(number)
        time.sleep(1)
    assert caught.value.exit_code == code


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in interrupts.SIGNALS]
    with stoppable():
        assert signal.getsignal(signal.SIGTERM) is not before[0]
    assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_deferred_block_happens_completely():
    done = []
    with pytest.raises(Stopped), stoppable():
        with deferred():
            with deferred():
                raise_signal()
                done.append(1)
            done.append(2)
        done.append(3)
    assert done == [1, 2]


def test_signal_of_a_failed_block_does_not_stop_the_next_run():
    with pytest.raises(InputError, match="disk"), stoppable(), deferred():
        raise_signal()
        raise InputError("the disk is full")
    with stoppable(), deferred():
        pass


@BOTH
def test_process_exits_with_the_signals_code_and_resumes(tmp_path, number, code):
    small_run(tmp_path / "whole")
    began = time.perf_counter()
    small_run(tmp_path / "timed")
    duration = time.perf_counter() - began
    delays, stopped = random.Random(number), 0
    ready, tell = os.pipe()

    def announce_and_run(folder: Path) -> None:
        os.write(tell, b".")
        small_run(folder, quiet=False)

    for trial in range(4):
        folder, log = tmp_path / f"run{trial}", tmp_path / f"log{trial}"
        child = fork(partial(announce_and_run, folder), log)
        os.read(ready, 1)  # a signal that comes sooner meets a process that is no run yet
        found = signal_later(child, delays.uniform(0.1, 0.8) * duration, number)
        text = log.read_text()
        assert found in (0, code), text
        assert "Traceback" not in text
        if found:
            assert f"error: stopped by signal {number:d}" in text
        stopped += found == code
        small_run(folder)
        assert outcome(folder) == outcome(tmp_path / "whole")
    assert stopped
    COUNTS["runs stopped by a signal"] += stopped


def test_script_that_has_not_begun_its_run_stops_in_one_line(tmp_path):
    log = tmp_path / "log"
    ready, tell = os.pipe()

    def load_data() -> None:
        os.write(tell, b".")
        time.sleep(30)

    child = fork(load_data, log)
    os.read(ready, 1)
    assert signal_later(child, 0, signal.SIGINT) == 130
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_signal_before_any_line_loses_nothing(tmp_path):
    shorter = dict(n_tasks=2, n_epochs=2, batch_size_train=30)
    small_run(tmp_path / "whole", **shorter)
    expected = outcome(tmp_path / "whole")
    lines = trace(lambda: small_run(tmp_path / "traced", **shorter))
    stopped = 0
    for n in moments(lines, ("training.py",), 60, seed=1):
        folder = tmp_path / str(n)
        try:
            signalled_at(n, signal.SIGTERM, lambda folder=folder: small_run(folder, **shorter))
        except Stopped:
            stopped += 1
        small_run(folder, **shorter)
        assert outcome(folder) == expected, f"stopped at {lines[n]}"
    assert stopped > 80
    COUNTS["runs stopped by a signal"] += stopped


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_to_the_same_numbers(tmp_path, method):
    model = Normalised if method != "ogd" else None
    start = lambda folder: small_run(folder, method=method, **({"model": model} if model else {}))  # noqa: E731
    try:
        start(tmp_path / "whole")
    except InputError as error:
        pytest.skip(str(error))
    expected = outcome(tmp_path / "whole")
    lines = trace(lambda: start(tmp_path / "traced"))
    for n in random.Random(2).sample(range(len(lines)), 3):
        folder = tmp_path / str(n)
        try:
            signalled_at(n, signal.SIGTERM, lambda folder=folder: start(folder))
        except Stopped:
            COUNTS["runs stopped by a signal"] += 1
        start(folder)
        assert outcome(folder) == expected, f"stopped at {lines[n]}"
