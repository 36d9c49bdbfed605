"""What a rank does at each step of a ring: geometry, no tensors.

forward    own block | remote blocks, that of the left neighbour last
backward   the left neighbour's block | the other remote blocks | own block
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from seqpar.layout import SequenceLayout, Span
from seqpar.ops.softmax_tiles import Mask, Tile, block_tiles, compact_keys

__all__ = ["RingSchedule", "Step", "most_keys_sent", "own_schedule", "ring_schedule"]


@dataclass(frozen=True)
class Step:
    """One step of one rank.

    Ranks are ranks of the process group.

    Attributes:
        tiles: its queries with the block at hand, on the keys that were sent, laid end to end.
        recv_from: whose block it is. num_recv: how many keys of it this rank sees.
        send_to: who works on this rank's block at this step.
        send_keys: the local ranges of this rank's keys that `send_to` sees.
    """

    tiles: tuple[Tile, ...]
    recv_from: int
    num_recv: int
    send_to: int
    send_keys: tuple[Span, ...]
    is_own: bool = False


@dataclass(frozen=True)
class RingSchedule:
    """The steps of one rank, forward and backward; every rank's are matched step by step.

    Empty steps stay in their place: were they left out on one rank alone, two messages between the
    same two ranks (a block, and gradients of another) could be posted in different orders.
    """

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]

    @staticmethod
    def with_following(steps: tuple[Step, ...]) -> Iterator[tuple[Step, Step | None]]:
        """Each step with the one after it."""
        return zip(steps, (*steps[1:], None), strict=True)


@lru_cache(maxsize=64)
def ring_schedule(
    layout: SequenceLayout,
    key_layout: SequenceLayout,
    rank: int,
    mask: Mask,
    members: tuple[int, ...],
) -> RingSchedule:
    """The schedule of the layout's `rank`: queries lie in `layout`, keys in `key_layout`.

    `members[r]` is the group rank that stands for the layout's rank r.
    """
    own = _own_step(block_tiles(layout, key_layout, rank, rank, mask), key_layout.tokens_on(rank))
    size = layout.world_size
    remote = []
    for distance in range(1, size):
        owner, reader = (rank + distance) % size, (rank - distance) % size
        needed, tiles = compact_keys(block_tiles(layout, key_layout, rank, owner, mask))
        sent, _ = compact_keys(block_tiles(layout, key_layout, reader, rank, mask))
        num_recv = sum(span.num_tokens for span in needed)
        remote.append(Step(tiles, members[owner], num_recv, members[reader], sent))
    if not any(step.num_recv or step.send_keys for step in remote):
        return RingSchedule((own,), (own,))
    return RingSchedule((own, *remote), (remote[-1], *remote[:-1], own))


@lru_cache(maxsize=64)
def most_keys_sent(layout: SequenceLayout, key_layout: SequenceLayout, mask: Mask) -> int:
    """A bound on the keys that any rank sends any other at a step: the same number on every rank.

    By documents and window alone, which is quicker than all pairs' tiles: an owner's keys of the
    documents that the reader has queries of, under a window no more than it reaches from each run.
    """
    ranks = range(layout.world_size)
    reach = None if mask.back is None else mask.back + (mask.ahead or 0)
    runs_read = [Counter(run.document for run in layout.runs(rank)) for rank in ranks]
    most = 0
    for owner in ranks:
        held: Counter[int] = Counter()
        for run in key_layout.runs(owner):
            held[run.document] += run.num_tokens
        for reader in ranks:
            if reader != owner:
                most = max(most, _seen(held, runs_read[reader], reach))
    return most


def _seen(held: Counter[int], runs_read: Counter[int], reach: int | None) -> int:
    """Keys of the documents read, each run of a window seeing `reach` beyond its own positions."""
    shared = held.keys() & runs_read.keys()
    if reach is None:
        return sum(held[document] for document in shared)
    return sum(min(held[document], reach * runs_read[document]) for document in shared)


def own_schedule(tiles: tuple[Tile, ...], num_keys: int) -> RingSchedule:
    """The schedule of a rank that has all its keys at hand."""
    own = _own_step(tiles, num_keys)
    return RingSchedule((own,), (own,))


def _own_step(tiles: tuple[Tile, ...], num_keys: int) -> Step:
    return Step(tiles, recv_from=-1, num_recv=num_keys, send_to=-1, send_keys=(), is_own=True)
