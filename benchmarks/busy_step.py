"""A step that is busy in Python, as launching kernels is, beside other work of its process.

It is a loop of about 30 ms. What it waits for the interpreter lock is its wall-clock time without
what it computes and what it waits for a core (Linux tells both), so that other work on the machine
does not count.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["busy_step_ms"]


def busy_step_ms(beside: Callable[[], Any] | None) -> tuple[float, float]:
    """Medians over 40 steps, ms each: wall-clock, and what of it went to waiting for the lock.

    Args:
        beside: what a thread of this process does all the while, again and again; None: nothing.
    """
    stop = threading.Event()

    def keep_doing() -> None:
        while beside is not None and not stop.is_set():
            beside()

    other = threading.Thread(target=keep_doing)
    other.start()
    time.sleep(0.5)  # if it works in a process of its own, that has started by then
    times, waits = [], []
    for _ in range(40):
        start, on_core = time.perf_counter(), _core_ms()
        total = 0
        for i in range(1_000_000):
            total += i & 7
        times.append((time.perf_counter() - start) * 1e3)
        waits.append(max(0.0, times[-1] - (_core_ms() - on_core)))
        time.sleep(0.005)
    stop.set()
    other.join()
    return statistics.median(times), statistics.median(waits)


def _core_ms() -> float:
    """What this thread has spent so far on a core or waiting for one."""
    running, waiting, _ = Path("/proc/thread-self/schedstat").read_text().split()
    return (int(running) + int(waiting)) / 1e6
