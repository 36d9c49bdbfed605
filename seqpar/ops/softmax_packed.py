"""Tiles carried out many at a time by FlashAttention-2's packed kernel.

Legend: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim.

A packed call takes one pair of diagonal bounds and segments that lie one after the other in the
queries and in the keys. `waves` sorts tiles into as few such calls as can be; rows and keys between
two tiles become segments without a partner.

    tiles     rows 0..9 with keys 0..9, rows 12..20 with keys 30..40
    segments  (0..9, 0..9)  (9..12, none)  (none, 9..30)  (12..20, 30..40)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.ops.softmax_operands import Operands, TileGradients, TileOutputs
from seqpar.ops.softmax_tiles import Tile

__all__ = ["FlashPacked", "Wave", "waves"]

_aten = torch.ops.aten
Bounds = tuple[int | None, int | None]


class Wave(NamedTuple):
    """One packed call.

    Attributes:
        bounds: left and right, along the diagonal that ends in the bottom right of each segment.
        rows, keys: the ranges of local tokens that the call covers.
        cu_q, cu_k: segment bounds, from 0, within those ranges.
        max_q, max_k: at least the longest segment.
        has_empty_rows: some rows of a tile have no keys.
        row_parts, key_parts: (start, stop) within those ranges of what belongs to some tile.
    """

    bounds: Bounds
    rows: tuple[int, int]
    keys: tuple[int, int]
    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    max_q: int
    max_k: int
    has_empty_rows: bool
    row_parts: tuple[tuple[int, int], ...]
    key_parts: tuple[tuple[int, int], ...]


class FlashPacked:
    """FlashAttention-2, 16-bit, D up to 256, any bounds; deterministic if torch is told to be."""

    name = "flash"
    head_dim_multiple = 8

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], *, scale: float
    ) -> TileOutputs:
        results = []
        for wave in waves(tuple(tiles), q.shape[0], q.shape[1], k.shape[1]):
            out, lse, *_ = _aten._flash_attention_forward(
                _flat(q[:, slice(*wave.rows)]), *(_flat(x[:, slice(*wave.keys)]) for x in (k, v)),
                *_segments(wave, q.device), wave.max_q, wave.max_k, 0.0,
                wave.bounds == (None, 0), False, scale=scale, **_window(wave),
            )  # fmt: skip
            lse = lse.T.reshape(q.shape[0], -1, q.shape[2])
            if wave.has_empty_rows:
                lse = torch.where(torch.isposinf(lse), -torch.inf, lse)
            out = out.view(*lse.shape, -1)
            results += [
                (wave.rows[0] + start, out[:, start:stop], lse[:, start:stop])
                for start, stop in wave.row_parts
            ]
        return results

    def backward(self, x: Operands, tiles: Sequence[Tile], *, scale: float) -> TileGradients:
        by_row, by_key = [], []
        unused = torch.zeros(2, dtype=torch.int64, device=x.q.device)  # the state of a dropout
        for wave in waves(tuple(tiles), x.q.shape[0], x.q.shape[1], x.k.shape[1]):
            dout, q, k, v, out, lse = x.part(slice(*wave.rows), slice(*wave.keys))
            dq, dk, dv = _aten._flash_attention_backward(
                *(_flat(y) for y in (dout, q, k, v, out)), _flat(lse).T.contiguous(),
                *_segments(wave, q.device), wave.max_q, wave.max_k, 0.0, wave.bounds == (None, 0),
                unused, unused, scale=scale, **_window(wave),
            )  # fmt: skip
            dq, dk, dv = (y.unflatten(0, (q.shape[0], -1)) for y in (dq, dk, dv))
            by_row += [(wave.rows[0] + a, dq[:, a:b]) for a, b in wave.row_parts]
            by_key += [(wave.keys[0] + a, dk[:, a:b], dv[:, a:b]) for a, b in wave.key_parts]
        return by_row, by_key


@lru_cache(maxsize=1024)
def waves(tiles: tuple[Tile, ...], batch: int, num_rows: int, num_keys: int) -> tuple[Wave, ...]:
    """As few packed calls as carry out the tiles for each of `batch` sequences."""
    preferred = sorted({(tile.left, tile.right) for tile in tiles}, key=_looseness)
    groups: list[tuple[Bounds, list[Tile]]] = []
    for tile in sorted(tiles):
        bounds = next(b for b in preferred if _means(b, tile))
        for group_bounds, members in groups:
            last = members[-1]
            if (
                group_bounds == bounds
                and last.q_stop <= tile.q_start
                and last.k_stop <= tile.k_start
            ):
                members.append(tile)
                break
        else:
            groups.append((bounds, [tile]))
    return tuple(_wave(b, members, batch, num_rows, num_keys) for b, members in groups)


def _looseness(bounds: Bounds) -> tuple[int, ...]:
    return (bounds.count(None), *(-1 if b is None else b for b in bounds))


def _means(bounds: Bounds, tile: Tile) -> bool:
    """Whether bounds are those of the tile: equal, or without effect where the tile has none."""
    left, right = bounds
    loose_left = left is None or left >= tile.num_keys - 1
    loose_right = right is None or right >= tile.num_queries - 1
    return (left == tile.left or (tile.left is None and loose_left)) and (
        right == tile.right or (tile.right is None and loose_right)
    )


def _wave(bounds: Bounds, tiles: list[Tile], batch: int, num_rows: int, num_keys: int) -> Wave:
    rows, keys = (0, num_rows), (0, num_keys)
    if batch == 1:
        rows = (tiles[0].q_start, tiles[-1].q_stop)
        keys = (tiles[0].k_start, tiles[-1].k_stop)
    pairs: list[tuple[int, int]] = []  # (row, key) at which each segment stops
    right = bounds[1]
    for b in range(batch):
        row, key = b * num_rows, b * num_keys
        ends = [*tiles, Tile(rows[1], rows[1], keys[1], keys[1])]
        for tile in ends:
            q_start = b * num_rows + tile.q_start - rows[0]
            k_start = b * num_keys + tile.k_start - keys[0]
            if q_start > row:
                pairs.append((q_start, key))
            if k_start > key:
                pairs.append((q_start, k_start))
            row, key = q_start + tile.num_queries, k_start + tile.num_keys
            if tile.num_queries:
                pairs.append((row, key))
    cu_q, cu_k = ((0, *stops) for stops in zip(*pairs, strict=True))
    max_q, longest_k = (
        max(stop - start for start, stop in itertools.pairwise(cu)) for cu in (cu_q, cu_k)
    )
    return Wave(
        bounds=bounds,
        rows=rows,
        keys=keys,
        cu_q=cu_q,
        cu_k=cu_k,
        max_q=max_q,
        max_k=max(longest_k, *_reach(bounds, max_q)),
        has_empty_rows=right is not None and any(t.num_queries - right > t.num_keys for t in tiles),
        row_parts=_stretches((t.q_start - rows[0], t.q_stop - rows[0]) for t in tiles),
        key_parts=_stretches((t.k_start - keys[0], t.k_stop - keys[0]) for t in tiles),
    )


def _reach(bounds: Bounds, max_q: int) -> tuple[int, int]:
    """What max_k must be at least: the kernel caps the right bound of a window at max_k.

    In a segment higher than wide, the cap would cut keys off that a longer reach still sees.
    """
    left, right = bounds
    return (max_q if left is not None else 1), (1 if right is None else right + 1)


def _stretches(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Ascending ranges, neighbours joined."""
    joined: list[tuple[int, int]] = []
    for start, stop in ranges:
        if joined and joined[-1][1] == start:
            joined[-1] = joined[-1][0], stop
        else:
            joined.append((start, stop))
    return tuple(joined)


@lru_cache(maxsize=256)
def _segments(wave: Wave, device: torch.device) -> tuple[Tensor, Tensor]:
    """int32 bounds of the segments, on the device."""
    bounds = torch.tensor((wave.cu_q, wave.cu_k), dtype=torch.int32).to(device)
    return bounds[0], bounds[1]


def _window(wave: Wave) -> dict[str, int | None]:
    return {"window_size_left": wave.bounds[0], "window_size_right": wave.bounds[1]}


def _flat(x: Tensor) -> Tensor:
    """[B, T, ...] -> [B * T, ...]."""
    return x.flatten(0, 1)
