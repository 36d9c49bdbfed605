"""A launcher that is told to stop: signals become an exception, and that an error with its code."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from seqpar.errors import LaunchError
from seqpar.launch.placement import Placement

__all__ = ["JobStoppedError", "StoppedError", "stop_error", "stopped_by_signals"]

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
OUT_OF_TIME = 124
"""The exit code of a job whose time was up, as of timeout(1)."""


class StoppedError(Exception):
    """A signal arrived; never leaves the engines."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class JobStoppedError(LaunchError):
    """The job was stopped from outside, or its time was up; `exit_code` is 128 + signal, or 124."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise StoppedError in the main thread when the launcher is told to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, _frame: FrameType | None) -> None:
        raise StoppedError(number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_error(placement: Placement, number: int, *, out_of_time: bool) -> JobStoppedError:
    """The error that ends a stopped job."""
    spec = placement.spec
    if out_of_time:
        return JobStoppedError(
            f"job {spec.name} was stopped: it ran for its timeout_s of {spec.timeout_s:g}; "
            "raise timeout_s, or go on from its last checkpoint with --resume",
            exit_code=OUT_OF_TIME,
        )
    name = signal.Signals(number).name
    return JobStoppedError(f"job {spec.name} was stopped by {name}", exit_code=128 + number)
