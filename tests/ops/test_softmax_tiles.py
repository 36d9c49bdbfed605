"""Tiles against the mask written out pair by pair, for every layout and mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_dense import cut
from seqpar.ops.softmax_tiles import Mask, Tile, block_tiles, compact_keys, num_pairs
from tests.ops.softmax_cases import layouts
from tests.ops.softmax_reference import visible

BOUNDS = [(0, 1), (0, 2), (0, 37), (0, 3, 20, 21, 48)]
MASKS = [Mask(causal, window) for causal in (True, False) for window in (None, 1, 2, 7, 100)]


def painted(tiles: tuple[Tile, ...], rows: int, columns: int) -> Tensor:
    """How often each pair is covered."""
    count = torch.zeros(rows, columns, dtype=torch.int64)
    for tile in tiles:
        nq, nk = tile.num_queries, tile.num_keys
        distance = torch.arange(nq)[:, None] + nk - nq - torch.arange(nk)
        sees = torch.ones(nq, nk, dtype=torch.bool)
        if tile.left is not None:
            sees &= distance <= tile.left
        if tile.right is not None:
            sees &= distance >= -tile.right
        assert num_pairs(tile) == sees.sum(), tile
        assert sees.any(0).all(), f"a key that no row sees: {tile}"
        assert sees.any(1).all(), f"a row that sees no key: {tile}"
        count[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] += sees
    return count


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_tiles_cover_each_visible_pair_once(
    mask: Mask, bounds: tuple[int, ...], world_size: int
) -> None:
    sees = visible(bounds, causal=mask.causal, window=mask.window)
    for layout in layouts(bounds, world_size):
        for rank in range(world_size):
            rows = layout.stream_positions(rank)
            for other in range(world_size):
                columns = layout.stream_positions(other)
                expected = sees[rows][:, columns].long()
                tiles = block_tiles(layout, layout, rank, other, mask)
                assert torch.equal(painted(tiles, len(rows), len(columns)), expected)
                pieces = tuple(piece for tile in tiles for piece in cut(tile))
                assert torch.equal(painted(pieces, len(rows), len(columns)), expected)

                ranges, moved = compact_keys(tiles)
                kept = torch.cat([torch.arange(*r) for r in ranges] or [columns[:0]])
                assert torch.equal(painted(moved, len(rows), len(kept)), expected[:, kept])
                assert expected.sum() == expected[:, kept].sum()


def test_zigzag_needs_one_tile_a_pair_of_ranks() -> None:
    layout = SequenceLayout.zigzag((0, 64), 4)
    mask = Mask()
    assert block_tiles(layout, layout, 1, 1, mask) == (Tile(0, 16, 0, 16, None, 0),)
    assert block_tiles(layout, layout, 1, 3, mask) == (Tile(8, 16, 0, 16),)
    assert block_tiles(layout, layout, 3, 1, mask) == (Tile(0, 16, 0, 8),)


@pytest.mark.parametrize(
    "tile",
    [
        Tile(0, 1100, 0, 1100, 37, 0),
        Tile(5, 1105, 3, 1133, 37, 5),
        Tile(0, 1300, 0, 1100, 37, 300),
        Tile(0, 1100, 0, 1100, None, 40),
        Tile(0, 700, 0, 1100, 600, None),
    ],
    ids=str,
)
def test_windows_are_cut_into_bands(tile: Tile) -> None:
    """Rows beyond one band: each band has bounds of its own."""
    pieces = cut(tile)
    assert len(pieces) > 1
    assert torch.equal(painted(pieces, 1400, 1400), painted((tile,), 1400, 1400))
