"""Which queries see which keys, as rectangles of local tokens: geometry, no tensors.

A *tile* is a rectangle of query rows and key columns of two local tensors, with at most a left and
a right bound along the diagonal that ends in its bottom right corner. Row i of nq sees column j of
nk if

    i + nk - nq - left  <=  j  <=  i + nk - nq + right          (None: no bound)

which is FlashAttention-2's convention, so that (None, None) is a full rectangle, (None, 0) a causal
one and (w, 0) a causal window of w + 1 keys.

    one document on two zigzag ranks          rank 0 to its own keys: 1 tile, (None, 0)
    pieces   |0|1|2|3|   rank 0: 0, 3         rank 0 to rank 1's keys: 1 tile, rows of piece 3, full
                         rank 1: 1, 2         rank 1 to rank 0's keys: 1 tile, columns of piece 0

Documents, causality, windows and any spans all end up as such tiles; an empty list means that the
two ranks have nothing to say to each other, and nothing is computed or sent.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from seqpar.layout import Run, SequenceLayout, Span

__all__ = ["Mask", "Tile", "block_tiles", "compact_keys", "num_pairs", "tiles_between"]


@dataclass(frozen=True)
class Mask:
    """What a query may see within its document, besides the document itself.

    `window` counts the query itself: a query at p sees p-window+1 .. p, and if not causal also
    p .. p+window-1.
    """

    causal: bool = True
    window: int | None = None

    @property
    def back(self) -> int | None:
        """How many positions back a query sees; None: all."""
        return None if self.window is None else self.window - 1

    @property
    def ahead(self) -> int | None:
        """How many positions ahead a query sees; None: all."""
        return 0 if self.causal else self.back


class Tile(NamedTuple):
    """Local query rows, local key columns, and the bounds along the bottom right diagonal."""

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    left: int | None = None
    right: int | None = None

    @property
    def num_queries(self) -> int:
        return self.q_stop - self.q_start

    @property
    def num_keys(self) -> int:
        return self.k_stop - self.k_start

    @property
    def is_full(self) -> bool:
        return self.left is None and self.right is None

    @property
    def is_causal(self) -> bool:
        """Bounded on the right only, by the diagonal itself."""
        return self.left is None and self.right == 0

    @property
    def is_square(self) -> bool:
        return self.num_queries == self.num_keys


@lru_cache(maxsize=256)
def block_tiles(
    layout: SequenceLayout, key_layout: SequenceLayout, rank: int, key_rank: int, mask: Mask
) -> tuple[Tile, ...]:
    """The tiles of the queries on `rank` with the keys on `key_rank`."""
    return tiles_between(layout.runs(rank), key_layout.runs(key_rank), mask)


def tiles_between(q_runs: Sequence[Run], k_runs: Sequence[Run], mask: Mask) -> tuple[Tile, ...]:
    """The tiles of queries in `q_runs` with keys in `k_runs`, as few and as large as can be.

    Runs are in local order, those of one document one after the other, as in a layout.
    """
    by_document: dict[int, list[Run]] = {}
    for run in k_runs:
        by_document.setdefault(run.document, []).append(run)
    by_row: list[Tile] = []
    for q_run in q_runs:
        keys = by_document.get(q_run.document, [])
        for piece in _cut(q_run, keys) if mask.causal else (q_run,):
            found = (_tile(piece, key, mask.back, mask.ahead) for key in keys)
            by_row += _joined(tile for tile in found if tile is not None)
    return tuple(_joined(by_row))


def compact_keys(tiles: Iterable[Tile]) -> tuple[tuple[Span, ...], tuple[Tile, ...]]:
    """The local key ranges that the tiles need, and the tiles on those ranges laid end to end."""
    tiles = tuple(tiles)
    ranges: list[Span] = []
    for start, stop in sorted({(tile.k_start, tile.k_stop) for tile in tiles}):
        if ranges and start <= ranges[-1].stop:
            ranges[-1] = Span(ranges[-1].start, max(stop, ranges[-1].stop))
        else:
            ranges.append(Span(start, stop))
    shifts = list(itertools.accumulate((r.num_tokens for r in ranges), initial=0))
    starts = [r.start for r in ranges]
    moved = []
    for tile in tiles:
        index = bisect_right(starts, tile.k_start) - 1
        shift = shifts[index] - starts[index]
        moved.append(tile._replace(k_start=tile.k_start + shift, k_stop=tile.k_stop + shift))
    return tuple(ranges), tuple(moved)


def num_pairs(tile: Tile) -> int:
    """How many (query, key) pairs the tile holds: its work."""
    nq, nk = tile.num_queries, tile.num_keys
    above = 0 if tile.right is None else _triangle(nq - 1 - tile.right, nk)
    below = 0 if tile.left is None else _triangle(nk - 1 - tile.left, nq)
    return nq * nk - above - below


def _triangle(side: int, limit: int) -> int:
    """Cells of a corner triangle of the given side, cut off at `limit` cells a line."""
    if side <= 0:
        return 0
    cut = max(0, side - limit)
    return side * (side + 1) // 2 - cut * (cut + 1) // 2


def _cut(q_run: Run, keys: Sequence[Run]) -> Iterator[Run]:
    """The run cut where a key run begins or ends, so that each piece is inside or outside it."""
    inner = {edge for key in keys for edge in (key.start, key.stop)}
    cuts = sorted(edge for edge in inner if q_run.start < edge < q_run.stop)
    for start, stop in itertools.pairwise([q_run.start, *cuts, q_run.stop]):
        yield Run(q_run.document, start, stop, q_run.local_start + start - q_run.start)


def _tile(q: Run, k: Run, back: int | None, ahead: int | None) -> Tile | None:
    """Two runs of one document: rows that see no key and keys that no row sees are cut off."""
    q_start = q.start if ahead is None else max(q.start, k.start - ahead)
    q_stop = q.stop if back is None else min(q.stop, k.stop + back)
    k_start = k.start if back is None else max(k.start, q.start - back)
    k_stop = k.stop if ahead is None else min(k.stop, q.stop + ahead)
    if q_start >= q_stop or k_start >= k_stop:
        return None
    left = None if back is None else back - (q_stop - k_stop)
    right = None if ahead is None else ahead + (q_stop - k_stop)
    return Tile(
        q.local_start + q_start - q.start,
        q.local_start + q_stop - q.start,
        k.local_start + k_start - k.start,
        k.local_start + k_stop - k.start,
        None if left is not None and left >= k_stop - k_start - 1 else left,
        None if right is not None and right >= q_stop - q_start - 1 else right,
    )


def _joined(tiles: Iterable[Tile]) -> list[Tile]:
    joined: list[Tile] = []
    for tile in tiles:
        both = _join(joined[-1], tile) if joined else None
        if both is None:
            joined.append(tile)
        else:
            joined[-1] = both
    return joined


def _join(a: Tile, b: Tile) -> Tile | None:
    """One tile for two neighbours, or None."""
    if a.left is not None or b.left is not None:
        return None
    if a[:2] == b[:2] and a.right is None and a.k_stop == b.k_start:
        return b._replace(k_start=a.k_start)
    if a.q_stop != b.q_start or a.k_start != b.k_start:
        return None
    if a.right is None and b.right is None and a.k_stop == b.k_stop:
        return a._replace(q_stop=b.q_stop)
    if _ends_causal(a) and _ends_causal(b) and b.k_stop - a.k_stop == b.num_queries:
        return a._replace(q_stop=b.q_stop, k_stop=b.k_stop, right=0)
    return None


def _ends_causal(tile: Tile) -> bool:
    return tile.right == 0 or (tile.right is None and tile.num_queries == 1)
