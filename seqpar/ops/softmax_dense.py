"""Tiles carried out one dense kernel call at a time.

Legend: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim.

A dense kernel knows full rectangles and causal squares; `cut` reduces every tile to those:

    causal, wider than high     full rectangle left of a causal square
    causal, higher than wide    the rows above the square see nothing and are cut off
    window                      bands of at most 512 rows over the keys they can see, with a bias

Rectangles never rely on a kernel's `is_causal`: its corner differs from kernel to kernel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from seqpar.ops.softmax_kernels import DenseKernel
from seqpar.ops.softmax_operands import Operands, TileGradients, TileOutputs
from seqpar.ops.softmax_tiles import Tile

__all__ = ["DenseBackend", "cut"]

BAND_ROWS = 512
"""Rows of a window that share one bias: more rows waste pairs, fewer waste launches."""


class DenseBackend:
    """One dense kernel, one call for each piece of each tile."""

    def __init__(self, kernel: DenseKernel) -> None:
        self.kernel = kernel
        self.name = kernel.name
        self.head_dim_multiple = kernel.head_dim_multiple

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], *, scale: float
    ) -> TileOutputs:
        results = []
        for tile in _pieces(tiles):
            keys, bias = slice(tile.k_start, tile.k_stop), _bias(tile, q)
            out, lse = self.kernel.forward(
                q[:, tile.q_start : tile.q_stop],
                k[:, keys],
                v[:, keys],
                causal=bias is None and tile.is_causal,
                bias=bias,
                scale=scale,
            )
            results.append((tile.q_start, out, lse))
        return results

    def backward(self, x: Operands, tiles: Sequence[Tile], *, scale: float) -> TileGradients:
        by_row, by_key = [], []
        for tile in _pieces(tiles):
            bias = _bias(tile, x.q)
            part = x.part(slice(tile.q_start, tile.q_stop), slice(tile.k_start, tile.k_stop))
            causal = bias is None and tile.is_causal
            dq, dk, dv = self.kernel.backward(part, causal=causal, bias=bias, scale=scale)
            by_row.append((tile.q_start, dq))
            by_key.append((tile.k_start, dk, dv))
        return by_row, by_key


def _pieces(tiles: Sequence[Tile]) -> Iterator[Tile]:
    for tile in tiles:
        yield from cut(tile)


@lru_cache(maxsize=4096)
def cut(tile: Tile) -> tuple[Tile, ...]:
    """Full rectangles, causal squares and bands that make up the tile; every row sees a key."""
    nq, nk = tile.num_queries, tile.num_keys
    if not nq or not nk:
        return ()
    if tile.is_full or (tile.is_causal and tile.is_square):
        return (tile,)
    if not tile.is_causal:
        return tuple(_bands(tile))
    if nq > nk:
        return cut(tile._replace(q_start=tile.q_stop - nk))
    edge = tile.k_stop - nq
    return (tile._replace(k_stop=edge, right=None), tile._replace(k_start=edge))


def _bands(tile: Tile) -> Iterator[Tile]:
    offset = tile.num_keys - tile.num_queries
    first = 0 if tile.right is None else max(0, -offset - tile.right)
    last = tile.num_queries if tile.left is None else min(0, tile.left) + tile.num_queries
    for start in range(first, last, BAND_ROWS):
        stop = min(start + BAND_ROWS, last)
        low = 0 if tile.left is None else max(0, start + offset - tile.left)
        high = tile.num_keys
        if tile.right is not None:
            high = min(high, stop + offset + tile.right)
        shift = (stop + offset) - high  # how far the band's own diagonal has moved
        yield Tile(
            tile.q_start + start,
            tile.q_start + stop,
            tile.k_start + low,
            tile.k_start + high,
            None if tile.left is None else tile.left - shift,
            None if tile.right is None else tile.right + shift,
        )


def _bias(tile: Tile, like: Tensor) -> Tensor | None:
    """[n, m] additive mask, 0 or -inf, for a tile that is neither full nor a causal square."""
    if tile.is_full or (tile.is_causal and tile.is_square):
        return None
    nq, nk = tile.num_queries, tile.num_keys
    row = torch.arange(nq, device=like.device)[:, None] + (nk - nq)
    distance = row - torch.arange(nk, device=like.device)  # > 0: the key lies left
    hidden = torch.zeros(nq, nk, dtype=torch.bool, device=like.device)
    if tile.left is not None:
        hidden |= distance > tile.left
    if tile.right is not None:
        hidden |= distance < -tile.right
    return torch.zeros(nq, nk, dtype=like.dtype, device=like.device).masked_fill_(
        hidden, -torch.inf
    )
