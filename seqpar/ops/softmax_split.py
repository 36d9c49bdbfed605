"""Tiles shared out by size: the large ones to a dense kernel, the rest to one packed call.

Legend: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqpar.ops.softmax_dense import DenseBackend
from seqpar.ops.softmax_packed import FlashPacked
from seqpar.ops.softmax_tiles import Tile

__all__ = ["SplitBackend"]


class SplitBackend:
    """Tiles named in `large` on the dense kernel, the others packed."""

    head_dim_multiple = 8

    def __init__(self, dense: DenseBackend, packed: FlashPacked, large: Sequence[Tile]) -> None:
        self.dense, self.packed, self.large = dense, packed, frozenset(large)
        self.name = f"{dense.name}+{packed.name}"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], *, scale: float
    ) -> list[tuple[int, Tensor, Tensor]]:
        large, small = self._shared_out(tiles)
        return [
            *self.dense.forward(q, k, v, large, scale=scale),
            *self.packed.forward(q, k, v, small, scale=scale),
        ]

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        tiles: Sequence[Tile],
        *,
        scale: float,
    ) -> tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor, Tensor]]]:
        large, small = self._shared_out(tiles)
        by_row, by_key = self.dense.backward(dout, q, k, v, out, lse, large, scale=scale)
        rows, keys = self.packed.backward(dout, q, k, v, out, lse, small, scale=scale)
        return by_row + rows, by_key + keys

    def _shared_out(self, tiles: Sequence[Tile]) -> tuple[list[Tile], list[Tile]]:
        large = [tile for tile in tiles if tile in self.large]
        return large, [tile for tile in tiles if tile not in self.large]
