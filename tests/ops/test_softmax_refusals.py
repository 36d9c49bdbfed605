"""Refusals: by name, on every rank, before anything is sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqpar import comm
from seqpar.errors import LayoutError, MeshError, SeqparError
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax import softmax_attention
from tests.ranks import run_ranks

LAYOUT = SequenceLayout.contiguous((0, 10, 24), 2)


def _call(rank: int, heads: int = 4, kv_heads: int = 2, **options: Any) -> str:
    """The error's type and text; what was sent before it must be nothing but the agreement."""
    layout = options.pop("layout", LAYOUT)
    key_layout = options.get("key_layout") or layout
    shape = options.pop("shape_by_rank", {}).get(rank)
    q = torch.randn(1, layout.tokens_on(rank), heads, 8)
    k = torch.randn(*(shape or (1, key_layout.tokens_on(rank), kv_heads, 8)))
    dtype = options.pop("dtype_by_rank", {}).get(rank)
    q, k = (x if dtype is None else x.to(dtype) for x in (q, k))
    with comm.count_traffic() as traffic:
        try:
            softmax_attention(q, k, k, layout=layout, group=dist.group.WORLD, **options)
        except SeqparError as error:
            assert traffic.calls == traffic["all_gather"].calls <= 1
            return f"{type(error).__name__}: {error}"
    return "accepted"


def _calls(rank: int, calls: list[dict[str, Any]]) -> list[str]:
    return [_call(rank, **call) for call in calls]


CROSS = SequenceLayout.contiguous((0, 5, 9, 12), 2)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"strategy": "rings"}, "LayoutError: no strategy 'rings': one of auto, ring"),
    ({"window": 0}, "LayoutError: window=0"),
    ({"strategy": "halo"}, "LayoutError: strategy 'halo' needs a window"),
    ({"heads": 3}, "LayoutError: 3 query heads are no multiple of 2 key/value heads"),
    (
        {"heads": 1, "kv_heads": 1, "strategy": "ulysses"},
        "MeshError: 1 query heads cannot be dealt out to 2 ranks: use strategy 'ring'",
    ),
    ({"strategy": "usp", "ulysses_degree": 3}, "MeshError: ulysses_degree=3 does not divide"),
    ({"strategy": "ring", "ulysses_degree": 2}, "MeshError: ulysses_degree=2 is for strategy"),
    ({"key_layout": CROSS, "causal": False}, "LayoutError: queries hold 2 documents, keys 3"),
    (
        {"key_layout": SequenceLayout.contiguous((0, 5, 9), 2)},
        "LayoutError: cross-attention has no order",
    ),
    (
        {"key_layout": SequenceLayout.contiguous((0, 5, 9), 2), "causal": False, "window": 3},
        "LayoutError: cross-attention has no order",
    ),
    (
        {"layout": SequenceLayout.contiguous((0, 24), 3)},
        "MeshError: the layout scatters the stream over 3 ranks, the group has 2",
    ),
]
ONE_RANK_WRONG: list[tuple[dict[str, Any], str, str]] = [
    (
        {"shape_by_rank": {1: (1, 11, 2, 8)}},
        "k of rank 1 is (1, 11, 2, 8), where the layout and q give (1, 12, 2, 8)",
        "ranks [1] of the group refused their input; rank 1: k of rank 1 is (1, 11, 2, 8)",
    ),
    (
        {"dtype_by_rank": {1: torch.float64}},
        "the ranks of the group were not given the same input",
        "the ranks of the group were not given the same input",
    ),
]


def test_what_every_rank_can_see_is_refused_on_every_rank() -> None:
    answers = run_ranks(2, _calls, [call for call, _ in REFUSED])
    for i, (call, text) in enumerate(REFUSED):
        for rank in range(2):
            assert answers[rank][i].startswith(text), (call, answers[rank][i])


def test_what_one_rank_has_wrong_is_refused_on_every_rank() -> None:
    answers = run_ranks(2, _calls, [call for call, _, _ in ONE_RANK_WRONG])
    for i, (_, on_rank_1, on_rank_0) in enumerate(ONE_RANK_WRONG):
        assert on_rank_0 in answers[0][i]
        assert on_rank_1 in answers[1][i]


def test_without_a_group() -> None:
    layout = SequenceLayout.contiguous((0, 8), 1)
    x = torch.randn(1, 8, 2, 4)
    with pytest.raises(LayoutError, match=r"q must be \[batch, tokens, heads, dim\]"):
        softmax_attention(x[0], x, x, layout=layout, group=None)
    with pytest.raises(LayoutError, match="k of rank 0 is"):
        softmax_attention(x, x[:, :7], x, layout=layout, group=None)
    with pytest.raises(MeshError, match="over 2 ranks, the group has 1"):
        softmax_attention(x, x, x, layout=LAYOUT, group=None)
