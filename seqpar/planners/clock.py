"""When a search has to end, by the clock."""

from __future__ import annotations

import time

__all__ = ["Clock"]


class Clock:
    """Says when the time is over, and remembers having said so.

    A search that it never stopped did all the work that it was allowed, which is counted: it gives
    the same answer every time. `time.monotonic` is one clock for all processes of a machine.

    Args:
        limit_ms: from now on; None never ends.
    """

    def __init__(self, limit_ms: float | None = None) -> None:
        self.deadline_s = float("inf") if limit_ms is None else time.monotonic() + limit_ms / 1e3
        self.has_struck = False

    def is_over(self) -> bool:
        """Whether the time is over."""
        if time.monotonic() > self.deadline_s:
            self.has_struck = True
        return self.has_struck

    def earlier(self, ms: float) -> Clock:
        """A clock that strikes that much before this one."""
        before = Clock()
        before.deadline_s = self.deadline_s - ms / 1e3
        return before
