"""What a rank does at each step of a ring: geometry, no tensors.

forward    own block | remote blocks, nearest first
backward   first half of the own heads | remote blocks | second half of the own heads
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from seqpar.layout import SequenceLayout, Span
from seqpar.ops.softmax_tiles import Mask, Tile, block_tiles, compact_keys

__all__ = ["RingSchedule", "Step", "ring_schedule"]


@dataclass(frozen=True)
class Step:
    """One step of one rank.

    Attributes:
        tiles: its queries with the block at hand, on the keys that were sent, laid end to end.
        recv_from: whose block it is. num_recv: how many keys of it this rank sees.
        send_to: who works on this rank's block at this step.
        send_keys: the local ranges of this rank's keys that `send_to` sees.
        share: of the key/value heads, numerator and denominator (0, 1): all.
    """

    tiles: tuple[Tile, ...]
    recv_from: int
    num_recv: int
    send_to: int
    send_keys: tuple[Span, ...]
    is_own: bool = False
    share: tuple[int, int] = (0, 1)

    def heads(self, num_heads: int) -> slice:
        """The share of `num_heads` key/value heads that this step works on."""
        part, parts = self.share
        return slice(-(-num_heads * part // parts), -(-num_heads * (part + 1) // parts))


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
    layout: SequenceLayout, key_layout: SequenceLayout, rank: int, mask: Mask
) -> RingSchedule:
    """The schedule of `rank`; queries lie in `layout`, keys and values in `key_layout`."""
    own = Step(
        tiles=block_tiles(layout, key_layout, rank, rank, mask),
        recv_from=rank,
        num_recv=key_layout.tokens_on(rank),
        send_to=rank,
        send_keys=(),
        is_own=True,
    )
    distances = range(1, layout.world_size)
    remote = tuple(_remote_step(layout, key_layout, rank, t, mask) for t in distances)
    if not any(step.num_recv or step.send_keys for step in remote):
        return RingSchedule((own,), (own,))
    halves = [Step(**{**vars(own), "share": (part, 2)}) for part in (0, 1)]
    return RingSchedule((own, *remote), (halves[0], *remote, halves[1]))


def _remote_step(
    layout: SequenceLayout, key_layout: SequenceLayout, rank: int, distance: int, mask: Mask
) -> Step:
    size = layout.world_size
    owner, reader = (rank - distance) % size, (rank + distance) % size
    needed, tiles = compact_keys(block_tiles(layout, key_layout, rank, owner, mask))
    sent, _ = compact_keys(block_tiles(layout, key_layout, reader, rank, mask))
    return Step(
        tiles=tiles,
        recv_from=owner,
        num_recv=sum(span.num_tokens for span in needed),
        send_to=reader,
        send_keys=sent,
    )
