"""Each backend that can run here against float64: rectangles, empty rows, GQA, windows, dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqpar.ops.softmax_local import Gradients, attend, attend_backward
from seqpar.ops.softmax_operands import Operands
from seqpar.ops.softmax_partial import PartialOutput
from seqpar.ops.softmax_tiles import Tile
from tests.ops.softmax_reference import reference
from tests.tolerances import assert_close

TILES = {
    "full square": [Tile(0, 40, 0, 40)],
    "wide": [Tile(0, 24, 0, 40)],
    "high": [Tile(0, 40, 0, 7)],
    "causal": [Tile(0, 40, 0, 40, None, 0)],
    "causal wide": [Tile(0, 24, 0, 40, None, 0)],
    "causal high: the first rows are empty": [Tile(0, 40, 0, 24, None, 0)],
    "rows without a tile": [Tile(8, 20, 3, 40)],
    "documents": [Tile(0, 9, 0, 9, None, 0), Tile(9, 10, 9, 10), Tile(10, 40, 10, 40, None, 0)],
    "window": [Tile(0, 40, 0, 40, 6, 0)],
    "window both ways": [Tile(0, 40, 0, 40, 6, 6)],
    "window, rectangle": [Tile(4, 30, 2, 40, 5, 3)],
    "window, high: rows at both ends are empty": [Tile(0, 40, 10, 20, 3, 0)],
    "right bound alone": [Tile(0, 40, 0, 40, None, 5)],
    "left bound alone": [Tile(0, 20, 0, 40, 30, None)],
    "left bound alone, high: the last rows are empty": [Tile(0, 40, 0, 10, 0, None)],
    "window both ways, high": [Tile(0, 30, 0, 10, 4, 24)],
    "overlapping rows": [Tile(0, 40, 0, 10), Tile(0, 40, 10, 25), Tile(20, 40, 25, 40)],
    "nothing": [],
}


def sees(tiles: list[Tile], rows: int, columns: int) -> Tensor:
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for tile in tiles:
        i = torch.arange(tile.num_queries)[:, None] + tile.num_keys - tile.num_queries
        distance = i - torch.arange(tile.num_keys)
        left = tile.num_keys + 99 if tile.left is None else tile.left
        right = tile.num_queries + 99 if tile.right is None else tile.right
        mask[tile.q_start : tile.q_stop, tile.k_start : tile.k_stop] |= (distance <= left) & (
            distance >= -right
        )
    return mask


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("heads", [(4, 4, 16, 16), (4, 2, 8, 8), (3, 1, 8, 5)], ids=str)
@pytest.mark.parametrize("name", TILES)
def test_cpu_conforms(name: str, heads: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    conforms(TILES[name], heads, dtype, "cpu")


def test_any_strides() -> None:
    """q, k, v and the gradient as views whose last dim is not the innermost in memory."""
    tiles = [Tile(0, 40, 0, 40, None, 0)]
    q, k, v, dout = (torch.randn(2, 8, 3, 40).transpose(1, 3) for _ in range(4))
    expected = reference(q, k, v, dout, sees(tiles, 40, 40), 0.3)
    merged = PartialOutput(q, 8)
    attend(merged, q, k, v, tiles, scale=0.3)
    out, lse = merged.result()
    grads = Gradients.of(q, k, v)
    attend_backward(grads, Operands(dout, q, k, v, out, lse), tiles, scale=0.3)
    got = (out, grads.dq.result(), grads.dk.result(), grads.dv.result())
    for what, x, ref in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert_close(x, ref, what=what)


def conforms(
    tiles: list[Tile],
    heads: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    *,
    num_tokens: int = 40,
    batch: int = 2,
    **options: object,
) -> None:
    """Forward, log-sum-exp and gradients over the tiles, on fresh draws."""
    num_heads, kv_heads, key_dim, value_dim = heads
    shapes = [(num_heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim)]
    shapes.append((num_heads, value_dim))
    q, k, v, dout = (torch.randn(batch, num_tokens, *s).to(device, dtype) for s in shapes)
    scale = key_dim**-0.5
    mask = sees(tiles, num_tokens, num_tokens)
    expected = reference(*(x.cpu() for x in (q, k, v, dout)), mask, scale)

    merged = PartialOutput(q, value_dim)
    attend(merged, q, k, v, tiles, scale=scale, **options)
    out, lse = merged.result()
    scores = torch.einsum("bihk,bjhk->bihj", q.cpu().double(), _expanded(k, num_heads)) * scale
    assert_close(
        lse.cpu().exp(),
        scores.masked_fill(~mask[:, None], -torch.inf).logsumexp(-1).exp(),
        what="exp(lse)",
        dtype=dtype,
    )
    assert torch.equal(torch.isneginf(lse).cpu().any(-1).any(0), ~mask.any(-1))

    grads = Gradients.of(q, k, v)
    attend_backward(grads, Operands(dout, q, k, v, out, lse), tiles, scale=scale, **options)
    got = (out, grads.dq.result(), grads.dk.result(), grads.dv.result())
    for what, x, ref in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert x.dtype == dtype
        assert_close(x, ref, what=what)


def _expanded(k: Tensor, num_heads: int) -> Tensor:
    return k.cpu().double().repeat_interleave(num_heads // k.shape[2], dim=2)
