"""Threads that look at host memory now and then, and have ended before the interpreter does.

torch lets go of the interpreter's lock while it frees a tensor. A thread that does so while the
interpreter ends is ended there, inside a destructor, and C++ then aborts the process. So no watcher
calls torch, none is the last to hold a tensor, and each is joined when its owner goes or at exit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable

from torch import Tensor

__all__ = ["watch"]

_JOIN_S = 1.0
"""More than any look takes; what cannot be joined is left to itself."""


def watch(
    owner: object, look: Callable[[], bool], page: Tensor, *, every_s: float, name: str
) -> Callable[[], object]:
    """Call `look` every so many seconds, from a thread, while it says so and the owner lives.

    Args:
        owner: when it is collected, or the interpreter is about to end, nobody looks any longer.
        look: must not hold the owner, nor call torch.
        page: memory that `look` reads, which lives until nobody looks.

    Returns:
        What ends it at once: the thread has ended when that returns.
    """
    # A lock and not an Event, whose own lock a collection within `wait` could want again.
    running = threading.Lock()
    running.acquire()
    arguments = (running, look, page, every_s)
    thread = threading.Thread(target=_look_until_released, args=arguments, name=name, daemon=True)
    thread.start()
    return weakref.finalize(owner, _end, running, thread, page)


def _look_until_released(
    running: threading.Lock, look: Callable[[], bool], page: Tensor, every_s: float
) -> None:
    """The page is held here too: a collection within `look` may be what ends the owner."""
    while not running.acquire(timeout=every_s) and look():
        pass


def _end(running: threading.Lock, thread: threading.Thread, page: Tensor) -> None:
    """The page is held until the thread has let go of it."""
    running.release()
    if thread is not threading.current_thread():
        thread.join(_JOIN_S)
