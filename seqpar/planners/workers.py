"""Processes that share work which divides: micro-batches, pieces of a step, sampled batches.

What they return is what one process would: items are independent, and results keep their order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

from seqpar.errors import PlanError
from seqpar.planners.worker import Worker

__all__ = ["Workers", "map_with"]

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """A pool of planning processes, each started when it first has something to do.

    Sent to another process it arrives as a fresh pool of the same size.

    Args:
        count: processes (default: the cores that this process may use). One means none: the work
            is done here.

    Raises:
        PlanError: a count below 1.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = _cores() if count is None else count
        if self.count < 1:
            raise PlanError(f"workers must be at least 1, got {count}")
        self._idle: SimpleQueue[Worker] = SimpleQueue()
        self._workers = [Worker() for _ in range(self.count)]
        for worker in self._workers:
            self._idle.put(worker)

    def __reduce__(self) -> tuple[Any, ...]:
        return Workers, (self.count,)

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`[function(item) for item in items]`; function, items and results must pickle."""
        if self.count == 1 or len(items) < 2:
            return [function(item) for item in items]

        def run(item: Item) -> Result:
            worker = self._idle.get()
            try:
                return worker.call(function, item)
            finally:
                self._idle.put(worker)

        with ThreadPoolExecutor(min(self.count, len(items))) as threads:
            return list(threads.map(run, items))

    def close(self) -> None:
        """End the processes; a later `map` starts others."""
        for worker in self._workers:
            worker.close()


def map_with(
    workers: Workers | None, function: Callable[[Item], Result], items: Sequence[Item]
) -> list[Result]:
    """`[function(item) for item in items]`, by the workers if there are any."""
    return [function(item) for item in items] if workers is None else workers.map(function, items)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
