"""Packed calls, segment by segment, against the tiles that they carry out."""

from __future__ import annotations

import itertools

import pytest
import torch

from seqpar.ops.softmax_packed import Wave, waves
from seqpar.ops.softmax_tiles import Mask, Tile, block_tiles
from tests.ops.softmax_cases import layouts
from tests.ops.test_softmax_local import TILES, sees

MASKS = [Mask(causal, window) for causal in (True, False) for window in (None, 1, 7)]


def painted(wave: Wave, batch: int, rows: int, columns: int) -> torch.Tensor:
    """bool [batch * rows, batch * columns]: the pairs of one packed call, by its own rule."""
    count = torch.zeros(batch * rows, batch * columns, dtype=torch.int64)
    left, right = (10**6 if bound is None else bound for bound in wave.bounds)
    assert (wave.cu_q[-1], wave.cu_k[-1]) == tuple(
        batch * (stop - start) if batch > 1 else stop - start
        for start, stop in (wave.rows, wave.keys)
    )
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(wave.cu_q), itertools.pairwise(wave.cu_k), strict=True
    ):
        assert q1 - q0 <= wave.max_q
        assert k1 - k0 <= wave.max_k
        shift = (k1 - k0) - (q1 - q0)
        distance = torch.arange(q1 - q0)[:, None] + shift - torch.arange(k1 - k0)
        rows_ = slice(wave.rows[0] + q0, wave.rows[0] + q1)
        count[rows_, wave.keys[0] + k0 : wave.keys[0] + k1] += (distance <= left) & (
            distance >= -right
        )
    in_parts = torch.zeros_like(count)
    for b in range(batch):
        for start, stop in wave.row_parts:
            in_parts[b * rows + wave.rows[0] + start : b * rows + wave.rows[0] + stop] += 1
    assert not (count.any(1) & ~in_parts.any(1)).any(), "a row that sees keys is no part"
    assert wave.has_empty_rows or torch.equal(count.any(1), in_parts.any(1))
    return count


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", TILES)
def test_waves_carry_out_the_tiles(name: str, batch: int) -> None:
    tiles = tuple(TILES[name])
    expected = torch.block_diag(*[sees(list(tiles), 40, 40).long()] * batch)
    total = torch.zeros_like(expected)
    for wave in waves(tiles, batch, 40, 40):
        total += painted(wave, batch, 40, 40)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("mask", MASKS, ids=str)
def test_waves_of_layouts(mask: Mask) -> None:
    for layout in layouts((0, 3, 20, 21, 48), 3):
        for rank, other in itertools.product(range(3), repeat=2):
            rows, keys = layout.tokens_on(rank), layout.tokens_on(other)
            tiles = block_tiles(layout, layout, rank, other, mask)
            total = torch.zeros(rows, keys, dtype=torch.int64)
            for wave in waves(tiles, 1, rows, keys):
                total += painted(wave, 1, rows, keys)
            assert torch.equal(total, sees(list(tiles), rows, keys).long())


def test_documents_share_one_call() -> None:
    """Short documents, long ones and single tokens of a causal stream: one launch."""
    tiles = (Tile(0, 1, 0, 1), Tile(1, 9, 1, 9, None, 0), Tile(9, 30, 9, 30, 10, 0))
    (wave,) = waves(tiles, 1, 30, 30)
    assert wave.bounds == (10, 0)
    assert wave.cu_q == wave.cu_k == (0, 1, 9, 30)
