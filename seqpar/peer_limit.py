"""How long ranks wait for one another over memory that they share, and what is said after that.

NCCL's watchdog does not see such waits. A kernel that has waited for the limit writes for whom to a
page of host memory, gives the host a moment to say so, and traps: every CUDA call of the process
then fails, and the process ends as it would by NCCL's watchdog. What the kernel does is in
`seqpar/kernels/peer_wait.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from datetime import timedelta

import torch
from torch import Tensor

__all__ = ["WaitLimit"]

_log = logging.getLogger(__name__)
_MISSING, _CALL, _LIMIT_NS, _TRAPS, _WORDS = range(5)
"""Of the page: 1 + the rank that did not arrive, and in which call; the limit; whether to trap."""
_LOOK_EVERY_S = 0.5


class WaitLimit:
    """A page of host memory that kernels read their limit from and report to, and who looks at it.

    Args:
        ranks: the group's members by global rank, for what is said.
        rank: this one's place among them.
    """

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self._ranks, self._rank = list(ranks), rank
        self._page = torch.zeros(_WORDS, dtype=torch.int64, pin_memory=torch.cuda.is_available())
        self._closed = threading.Event()

    @property
    def address(self) -> int:
        """Where kernels find the page."""
        return self._page.data_ptr()

    def tolerate(self, limit: timedelta) -> None:
        """Kernels that have waited so long from now on report it and go on, for a first trial."""
        self._page[_LIMIT_NS], self._page[_TRAPS] = _nanoseconds(limit), 0

    def enforce(self, limit: timedelta) -> None:
        """Kernels that have waited so long from now on end the process, which is logged first."""
        self._page[_LIMIT_NS], self._page[_TRAPS] = _nanoseconds(limit), 1
        arguments = (self._page, self._closed, self._ranks, self._rank)
        threading.Thread(target=_watch, args=arguments, name="peer limit", daemon=True).start()

    def problem(self) -> str | None:
        """What a kernel has reported, if one has."""
        return _problem(self._page, self._ranks, self._rank)

    def close(self) -> None:
        """Nobody looks at the page any longer."""
        self._closed.set()

    def __del__(self) -> None:
        self._closed.set()


def _nanoseconds(limit: timedelta) -> int:
    return round(limit.total_seconds() * 1e9)


def _problem(page: Tensor, ranks: Sequence[int], rank: int) -> str | None:
    if not page[_MISSING]:
        return None
    missing, call, limit_ns = (int(page[word]) for word in (_MISSING, _CALL, _LIMIT_NS))
    return (
        f"rank {ranks[rank]} has waited {limit_ns / 1e9:g} s for rank {ranks[missing - 1]} in "
        f"all_gather {call} over memory that they share, of ranks {ranks}"
    )


def _watch(page: Tensor, closed: threading.Event, ranks: Sequence[int], rank: int) -> None:
    while not closed.wait(_LOOK_EVERY_S):
        if (problem := _problem(page, ranks, rank)) is not None:
            _log.error(
                "%s; this process now ends with a CUDA launch failure: find out what the missing "
                "rank did, or give the group a longer timeout",
                problem,
            )
            return
