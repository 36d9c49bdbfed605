"""How long ranks wait for one another over memory that they share, and what is said after that.

NCCL's watchdog does not see such waits. A kernel that has waited for the limit writes for whom to a
page of host memory, gives the host a moment to say so, and traps: every CUDA call of the process
then fails, and the process ends as it would by NCCL's watchdog. What the kernel does is in
`seqpar/kernels/peer_wait.py`.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch

from seqpar.peers.watching import watch

__all__ = ["WaitLimit"]

_log = logging.getLogger(__name__)
_MISSING, _CALL, _LIMIT_NS, _TRAPS, _WORDS = range(5)
"""Of the page: 1 + the rank that did not arrive, and in which call; the limit; whether to trap."""
_LOOK_EVERY_S = 0.5
Words = ctypes.Array[ctypes.c_int64]


class WaitLimit:
    """A page of host memory that kernels read their limit from and report to, and who looks at it.

    Args:
        ranks: the group's members by global rank, for what is said.
        rank: this one's place among them.
    """

    def __init__(self, ranks: Sequence[int], rank: int) -> None:
        self._end: Callable[[], object] | None = None
        self._ranks, self._rank = list(ranks), rank
        self._page = torch.zeros(_WORDS, dtype=torch.int64, pin_memory=torch.cuda.is_available())
        self._words = (ctypes.c_int64 * _WORDS).from_address(self._page.data_ptr())

    @property
    def address(self) -> int:
        """Where kernels find the page."""
        return self._page.data_ptr()

    def tolerate(self, limit: timedelta) -> None:
        """Kernels that have waited so long from now on report it and go on, for a first trial."""
        self._words[_LIMIT_NS], self._words[_TRAPS] = _nanoseconds(limit), 0

    def enforce(self, limit: timedelta) -> None:
        """Kernels that have waited so long from now on end the process, which is logged first."""
        self._words[_LIMIT_NS], self._words[_TRAPS] = _nanoseconds(limit), 1
        look = partial(_look, self._words, self._ranks, self._rank)
        self._end = watch(self, look, self._page, every_s=_LOOK_EVERY_S, name="peer limit")

    def problem(self) -> str | None:
        """What a kernel has reported, if one has."""
        return _problem(self._words, self._ranks, self._rank)

    def close(self) -> None:
        """Nobody looks at the page any longer."""
        if self._end is not None:
            self._end()


def _nanoseconds(limit: timedelta) -> int:
    """For ever is as long as the word can say: 292 years."""
    return min(round(limit.total_seconds() * 1e9), 2**63 - 1)


def _problem(words: Words, ranks: Sequence[int], rank: int) -> str | None:
    missing, call, limit_ns = (words[word] for word in (_MISSING, _CALL, _LIMIT_NS))
    if not missing:
        return None
    return (
        f"rank {ranks[rank]} has waited {limit_ns / 1e9:g} s for rank {ranks[missing - 1]} in "
        f"all_gather {call} over memory that they share, of ranks {ranks}"
    )


def _look(words: Words, ranks: Sequence[int], rank: int) -> bool:
    """Whether to go on: no kernel has reported that it has waited for longer than the limit."""
    if (problem := _problem(words, ranks, rank)) is None:
        return True
    _log.error(
        "%s; this process now ends with a CUDA launch failure: find out what the missing rank did, "
        "or give the group a longer timeout",
        problem,
    )
    return False
