"""Tiles shared out between a dense and a packed kernel cover what they covered."""

from __future__ import annotations

import pytest
import torch

from seqpar.ops.softmax_split import GRAIN, LEAST, share_out
from seqpar.ops.softmax_tiles import Tile
from tests.ops.test_softmax_tiles import painted

TILES = [
    Tile(0, 5000, 0, 5000, None, 0),
    Tile(0, 4096, 0, 4096, None, 0),
    Tile(100, 3100, 7, 2507),
    Tile(0, 2500, 0, 5100, None, 0),
    Tile(0, 2047, 0, 5000),
    Tile(0, 5000, 0, 5000, 3000, 0),
    Tile(3, 40, 0, 37, None, 0),
]


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_each_pair_once_and_large_ones_on_the_grain(tile: Tile) -> None:
    large, small = share_out((tile,))
    assert torch.equal(painted((*large, *small), 5100, 5100), painted((tile,), 5100, 5100))
    for piece in large:
        assert piece.num_queries % GRAIN == piece.num_keys % GRAIN == 0
        assert min(piece.num_queries, piece.num_keys) >= LEAST
        assert piece.is_full or (piece.is_causal and piece.is_square)


def test_what_is_not_shared_stays_whole() -> None:
    narrow = Tile(0, 500, 0, 900, None, 0)
    assert share_out((narrow,)) == ((), (narrow,))


def test_what_does_not_repay_a_plan_is_not_shared() -> None:
    tile = Tile(0, 4096, 0, 4096, None, 0)
    assert share_out((tile,), 4096 * 4096) == ((tile,), ())
    assert share_out((tile,), 4096 * 4096 + 1) == ((), (tile,))
