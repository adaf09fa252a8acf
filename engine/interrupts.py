"""SIGTERM, SIGINT and SIGHUP as an exception that waits while the state of a run is between two complete ones."""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

HANG_UP = getattr(signal, "SIGHUP", None)  # of a terminal; Windows has none
SIGNALS = tuple(number for number in (signal.SIGTERM, signal.SIGINT, HANG_UP) if number is not None)
PR_SET_PDEATHSIG = 1
_depth = 0  # nested `deferred` blocks
_received: int | None = None


class Stopped(BaseException):
    """A signal asked the process to stop. Not an Exception: nothing but the end of the run may catch it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


def _stop(signal_number: int, _frame: object) -> None:
    global _received
    if _depth:
        _received = signal_number
    else:
        raise Stopped(signal_number)


@contextmanager
def stoppable() -> Iterator[None]:
    """Within this context the signals raise Stopped in the main thread, at once or at the end of a deferred block."""
    global _received
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    by_nohup = HANG_UP is not None and signal.getsignal(HANG_UP) is signal.SIG_IGN
    previous = {number: signal.signal(number, _stop) for number in SIGNALS if not (by_nohup and number == HANG_UP)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _received = None  # of a deferred block that failed: that failure has stopped the run already


@contextmanager
def deferred() -> Iterator[None]:
    """Within this context a signal waits: what is inside happens completely."""
    global _depth, _received
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1
    if not _depth and _received is not None:
        number, _received = _received, None
        raise Stopped(number)


def ending_with_parent(number: int) -> Callable[[], None] | None:
    """A subprocess's `preexec_fn` by which it gets a signal when its parent dies, however that happens (Linux only)."""
    return (lambda: ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)) if sys.platform == "linux" else None
