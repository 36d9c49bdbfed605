"""How long an exchange by copy engines may take, and what is said when it is over.

Streams that wait for a peer's word wait for ever, and NCCL's watchdog does not see it. Each stream
writes the number of the last exchange it has finished to a page of host memory; a thread that makes
no CUDA call, and so disturbs no capture, compares it with what was posted, and when; see
`seqpar.peers.watching`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch

from seqpar.peers.watching import watch

__all__ = ["ExchangeLimit"]

_log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5
_LEAST_WAIT_S = 1e-3
_WORD_BYTES = 4
Words = ctypes.Array[ctypes.c_int32]


class _Posted(NamedTuple):
    number: int
    at: float
    peers: tuple[int, ...]


class ExchangeLimit:
    """Ends what waits for a peer for longer than a collective may.

    Args:
        ranks: the group's members by global rank, for what is said.
        rank: this one's place among them.
        num_streams: how many streams report.
        limit: how long an exchange may be under way.
        end: called once when one has been for longer, from another thread. By default the process
            aborts, as by NCCL's watchdog: its streams wait for ever, and whoever asks them does.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        rank: int,
        num_streams: int,
        limit: timedelta,
        end: Callable[[], None] = os.abort,
    ) -> None:
        self._page = torch.zeros(
            num_streams, dtype=torch.int32, pin_memory=torch.cuda.is_available()
        )
        words = (ctypes.c_int32 * num_streams).from_address(self._page.data_ptr())
        self._posted: deque[_Posted] = deque()
        look = partial(_look, words, self._posted, list(ranks), rank, limit, end)
        every_s = min(_LOOK_EVERY_S, max(limit.total_seconds() / 4, _LEAST_WAIT_S))
        self._end = watch(self, look, self._page, every_s=every_s, name="exchange limit")

    def address(self, stream: int) -> int:
        """Where a stream writes the number of each exchange it has finished."""
        return self._page.data_ptr() + stream * _WORD_BYTES

    def posted(self, number: int, peers: Sequence[int]) -> None:
        """An exchange with these members of the group begins; numbers count up from 1."""
        self._posted.append(_Posted(number, time.monotonic(), tuple(peers)))

    def close(self) -> None:
        """Nobody looks any longer."""
        self._end()


def _look(
    words: Words,
    posted: deque[_Posted],
    ranks: Sequence[int],
    rank: int,
    limit: timedelta,
    end: Callable[[], None],
) -> bool:
    """Whether to go on: nothing that was posted has been under way for longer than the limit."""
    while posted and all(_has_passed(word, posted[0].number) for word in words):
        posted.popleft()
    if not posted or time.monotonic() - posted[0].at <= limit.total_seconds():
        return True
    _log.error(
        "rank %d has waited %g s for rank(s) %s in exchange %d by copy engines, of ranks %s; this "
        "process now ends: find out what the missing rank did, or give the group a longer timeout",
        ranks[rank],
        limit.total_seconds(),
        ", ".join(str(ranks[peer]) for peer in posted[0].peers),
        posted[0].number,
        ranks,
    )
    end()
    return False


def _has_passed(word: int, number: int) -> bool:
    """Whether a word of 32 bits, which overflows, has reached a number; streams compare alike."""
    return (word - number) % 2**32 < 2**31
