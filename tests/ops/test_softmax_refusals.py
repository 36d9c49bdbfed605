"""Refusals: by name, on every rank, before anything is sent."""

from __future__ import annotations

import math
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


def _call(
    rank: int,
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    k_shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    flat: bool = False,
    layout: SequenceLayout = LAYOUT,
    **options: Any,
) -> str:
    """The error's type and text; what was sent before it must be nothing but the agreement."""
    key_layout = options.get("key_layout") or layout
    queries, keys = (
        one.tokens_on(rank) if isinstance(one, SequenceLayout) else 12
        for one in (layout, key_layout)
    )
    q = torch.randn(1, queries, heads, head_dim).to(dtype)
    k = torch.randn(k_shape or (1, keys, kv_heads, head_dim)).to(dtype)
    q = q[0] if flat else q
    with comm.count_traffic() as traffic:
        try:
            softmax_attention(q, k, k, layout=layout, group=dist.group.WORLD, **options)
        except SeqparError as error:
            assert traffic.calls == traffic["all_gather"].calls <= 1
            return f"{type(error).__name__}: {error}"
    return "accepted"


def _calls(rank: int, calls: list[dict[str, Any]]) -> list[str]:
    return [_call(rank, **call) for call in calls]


def _calls_wrong_on_rank_1(rank: int, calls: list[dict[str, Any]]) -> list[str]:
    return [_call(rank, **(call if rank == 1 else {})) for call in calls]


CROSS = SequenceLayout.contiguous((0, 5, 9, 12), 2)
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"layout": None}, "LayoutError: layout must be a SequenceLayout, got None"),
    ({"strategy": "rings"}, "LayoutError: no strategy 'rings': one of auto, ring"),
    ({"strategy": ["ring"]}, "LayoutError: no strategy ['ring']"),
    ({"window": 0}, "LayoutError: window=0"),
    ({"window": 4.5}, "LayoutError: window=4.5: it counts keys"),
    *(({"scale": x}, f"LayoutError: scale={x} must be") for x in (0, -0.3, math.nan, math.inf)),
    ({"scale": torch.tensor(0.3)}, "LayoutError: scale=tensor(0.3000) must be a positive"),
    ({"dtype": torch.int64}, "KernelInputError: softmax attention has no fused kernel for torch.i"),
    ({"head_dim": 0}, "LayoutError: queries and keys have a head dim of 0"),
    ({"heads": 0}, "LayoutError: 0 query heads"),
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
ONE_RANK_WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"k_shape": (1, 11, 2, 8)},
        "k of rank 1 is (1, 11, 2, 8), where the layout and q give (1, 12, 2, 8)",
    ),
    ({"flat": True}, "q must be [batch, tokens, heads, dim], got [12, 4, 8]: 3 dims"),
    (
        {"layout": SequenceLayout.contiguous((0, 24), 3)},
        "the layout scatters the stream over 3 ranks, the group has 2",
    ),
    ({"strategy": ["ring"]}, "no strategy ['ring']"),
    ({"window": "4"}, "window='4': it counts keys"),
]
CALLED_DIFFERENTLY: list[dict[str, Any]] = [
    {"dtype": torch.float64},
    {"head_dim": 6},
    {"k_shape": (1, 12, 2, 8), "window": 4},
    {"scale": 0.3},
    {"key_layout": LAYOUT, "causal": False},
]


def test_what_every_rank_can_see_is_refused_on_every_rank() -> None:
    answers = run_ranks(2, _calls, [call for call, _ in REFUSED])
    for i, (call, text) in enumerate(REFUSED):
        for rank in range(2):
            assert answers[rank][i].startswith(text), (call, answers[rank][i])


def test_what_one_rank_has_wrong_is_refused_on_every_rank() -> None:
    answers = run_ranks(2, _calls_wrong_on_rank_1, [call for call, _ in ONE_RANK_WRONG])
    for i, (call, text) in enumerate(ONE_RANK_WRONG):
        assert f"Error: {text}" in answers[1][i], call
        refused = f"ranks [1] of the group refused their input; rank 1: {text}"
        assert refused in answers[0][i], call


def test_ranks_that_call_differently_are_refused() -> None:
    for answers in run_ranks(2, _calls_wrong_on_rank_1, CALLED_DIFFERENTLY):
        for call, answer in zip(CALLED_DIFFERENTLY, answers, strict=True):
            assert "the ranks of the group were not given the same input" in answer, call


def test_without_a_group() -> None:
    layout = SequenceLayout.contiguous((0, 8), 1)
    x = torch.randn(1, 8, 2, 4)
    with pytest.raises(LayoutError, match=r"q must be \[batch, tokens, heads, dim\]"):
        softmax_attention(x[0], x, x, layout=layout, group=None)
    with pytest.raises(LayoutError, match="k of rank 0 is"):
        softmax_attention(x, x[:, :7], x, layout=layout, group=None)
    with pytest.raises(MeshError, match="over 2 ranks, the group has 1"):
        softmax_attention(x, x, x, layout=LAYOUT, group=None)
