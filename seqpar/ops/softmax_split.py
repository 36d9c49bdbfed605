"""Tiles shared out by size: large ones to a dense kernel, what is left to packed calls.

Legend: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim.

cuDNN plans each new shape anew, for longer than a call takes, and the documents of a packed stream
bring new lengths with every batch. So the dense kernel gets lengths that are multiples of `GRAIN`,
few enough to be planned once, and work that repays a plan; the packed kernel gets the rest:

    causal, 5000 rows      causal 4096 x 4096       |  causal rows 4096..5000 over all 5000 keys
    full, 3000 x 2500      2048 x 2048              |  rows 2048..3000 over all keys, and
                                                    |  rows 0..2048 over keys 2048..2500
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from torch import Tensor

from seqpar.ops.softmax_dense import DenseBackend, cut
from seqpar.ops.softmax_operands import Operands, TileGradients, TileOutputs
from seqpar.ops.softmax_packed import FlashPacked
from seqpar.ops.softmax_tiles import Tile

__all__ = ["GRAIN", "LEAST", "SplitBackend", "share_out"]

GRAIN = 1024
"""Rows and keys of the dense kernel's tiles are multiples of this."""

LEAST = 2048
"""Tiles with fewer rows or keys than this are not worth a call of their own."""

LEAST_WORK = LEAST * LEAST * 32
"""Rows times keys times heads below which a dense call saves too little to repay its planning.

At this size, D = 128, forward and backward, it saves 0.17 to 0.21 ms of 0.60 on an H200, and the
two plans of a shape take 85 to 170 ms: they are repaid in 400 to 1,000 calls, 13 to 31 steps of a
model with 32 softmax layers. A tile of twice the side repays them in 100 to 190 calls.
"""


class SplitBackend:
    """Large tiles on the dense kernel, the rest packed."""

    head_dim_multiple = 8

    def __init__(
        self, dense: DenseBackend, packed: FlashPacked, *, least_work: int = LEAST_WORK
    ) -> None:
        self.dense, self.packed, self.least_work = dense, packed, least_work
        self.name = f"{dense.name}+{packed.name}"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], *, scale: float
    ) -> TileOutputs:
        large, small = share_out(tuple(tiles), self._least_pairs(q))
        return [
            *self.dense.forward(q, k, v, large, scale=scale),
            *self.packed.forward(q, k, v, small, scale=scale),
        ]

    def backward(self, x: Operands, tiles: Sequence[Tile], *, scale: float) -> TileGradients:
        large, small = share_out(tuple(tiles), self._least_pairs(x.q))
        by_row, by_key = self.dense.backward(x, large, scale=scale)
        rows, keys = self.packed.backward(x, small, scale=scale)
        return by_row + rows, by_key + keys

    def _least_pairs(self, q: Tensor) -> int:
        return self.least_work // (q.shape[0] * q.shape[2])


@lru_cache(maxsize=1024)
def share_out(
    tiles: tuple[Tile, ...], least_pairs: int = 0
) -> tuple[tuple[Tile, ...], tuple[Tile, ...]]:
    """(for the dense kernel, for the packed one); together they cover each pair once.

    `least_pairs`: rows times keys of a tile that is worth a plan of the dense kernel.
    """
    large: list[Tile] = []
    small: list[Tile] = []
    for tile in tiles:
        if tile.left is not None or tile.right not in (None, 0):
            small.append(tile)
            continue
        pieces = [shared for piece in cut(tile) for shared in _shared(piece, least_pairs)]
        if any(is_large for is_large, _ in pieces):
            large += [piece for is_large, piece in pieces if is_large]
            small += [piece for is_large, piece in pieces if not is_large]
        else:
            small.append(tile)  # whole: one segment, not several
    return tuple(large), tuple(small)


def _shared(piece: Tile, least_pairs: int) -> Iterator[tuple[bool, Tile]]:
    """A full rectangle or causal square as (is large, part)."""
    rows, keys = (n // GRAIN * GRAIN for n in (piece.num_queries, piece.num_keys))
    if min(rows, keys) < LEAST or rows * keys < least_pairs:
        yield False, piece
        return
    q_cut, k_cut = piece.q_start + rows, piece.k_start + keys
    yield True, piece._replace(q_stop=q_cut, k_stop=k_cut)
    if q_cut < piece.q_stop:
        yield False, piece._replace(q_start=q_cut)
    if piece.is_full and k_cut < piece.k_stop:
        yield False, piece._replace(q_stop=q_cut, k_start=k_cut)
