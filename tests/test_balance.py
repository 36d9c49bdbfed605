"""Balanced layouts: equal work and tokens, few cuts, every token once."""

from __future__ import annotations

import itertools
import random

import pytest

from seqpar.balance import balanced_layout, causal_work, imbalance
from seqpar.errors import LayoutError
from seqpar.layout import SequenceLayout
from tests.ops.softmax_reference import visible


def _lognormal(seed: int, total: int = 65536) -> list[int]:
    draw = random.Random(seed)
    bounds = [0]
    while bounds[-1] < total:
        length = max(16, int(draw.lognormvariate(7.6, 1.2)))
        bounds.append(min(total, bounds[-1] + length))
    return bounds


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_packed_documents_balance_within_three_percent(seed: int, world_size: int) -> None:
    bounds = _lognormal(seed)
    layout = balanced_layout(bounds, world_size)
    assert imbalance(layout) <= 0.03
    tokens = [layout.tokens_on(rank) for rank in range(world_size)]
    assert max(tokens) * world_size <= 1.03 * layout.num_tokens
    assert layout == balanced_layout(bounds, world_size)


@pytest.mark.parametrize("world_size", [2, 8])
def test_one_long_document_becomes_the_zigzag(world_size: int) -> None:
    layout = balanced_layout((0, 4096), world_size)
    assert layout == SequenceLayout.zigzag((0, 4096), world_size)
    assert imbalance(layout) <= 0.03


def test_documents_are_cut_only_where_balance_asks_for_it() -> None:
    layout = balanced_layout((0, 40, 46, 51, 54, 56), 2, tolerance=0.1)
    ranks = [{run.document for run in layout.runs(rank)} for rank in range(2)]
    assert ranks[0] & ranks[1] == {0}

    even = balanced_layout(range(0, 801, 100), 4)
    assert all(even.tokens_on(rank) == 200 for rank in range(4))
    assert all(run.num_tokens == 100 for rank in range(4) for run in even.runs(rank))


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_under_a_window_each_rank_has_one_span(world_size: int) -> None:
    layout = balanced_layout((0, 65536), world_size, window=4096)
    assert [len(spans) for spans in layout.spans] == [1] * world_size
    # The first 4096 queries see fewer keys. Ranks of equal tokens are 3.2% apart for that.
    assert imbalance(layout, window=4096) <= (0.033 if world_size == 8 else 0.03)


def test_a_window_shifts_tokens_to_where_less_is_seen() -> None:
    layout = balanced_layout((0, 65536), 2, window=4096)
    assert layout.tokens_on(0) > layout.tokens_on(1)
    even = SequenceLayout.contiguous((0, 65536), 2)
    assert imbalance(layout, window=4096) < 0.6 * imbalance(even, window=4096)


def test_for_attention_alone_work_counts_more_than_tokens() -> None:
    for_all, for_attention = (
        balanced_layout((0, 65536), 2, window=4096, attention_share=share) for share in (0.5, 0.95)
    )
    assert for_all == balanced_layout((0, 65536), 2, window=4096)
    assert for_attention.tokens_on(0) > for_all.tokens_on(0)
    assert imbalance(for_attention, window=4096) < 0.2 * imbalance(for_all, window=4096)
    assert for_attention.tokens_on(0) <= 1.03 * 32768
    with pytest.raises(LayoutError, match=r"from 0 to 1; got 1\.5"):
        balanced_layout((0, 65536), 2, window=4096, attention_share=1.5)


@pytest.mark.parametrize("seed", range(3))
def test_packed_documents_balance_under_a_window(seed: int) -> None:
    bounds = _lognormal(seed)
    assert imbalance(balanced_layout(bounds, 4, window=1024), window=1024) <= 0.04


@pytest.mark.parametrize("window", [None, 1, 5])
def test_work_is_the_number_of_visible_pairs(window: int | None) -> None:
    bounds = (0, 7, 30, 31)
    sees = visible(bounds, causal=True, window=window)
    for layout in (SequenceLayout.zigzag(bounds, 3), balanced_layout(bounds, 3, window=window)):
        expected = [
            int(sees[layout.stream_positions(rank)].sum()) for rank in range(layout.world_size)
        ]
        assert list(causal_work(layout, window=window)) == expected


@pytest.mark.parametrize("bounds", [(0,), (0, 1), (0, 1, 2, 3), (0, 3, 20, 21, 48)])
@pytest.mark.parametrize("world_size", [1, 2, 5])
@pytest.mark.parametrize("window", [None, 3])
def test_small_streams_have_every_token_once(
    bounds: tuple[int, ...], world_size: int, window: int | None
) -> None:
    layout = balanced_layout(bounds, world_size, window=window)
    held = [layout.stream_positions(rank).tolist() for rank in range(world_size)]
    assert sorted(itertools.chain(*held)) == list(range(bounds[-1]))


@pytest.mark.parametrize("window", [0, -3])
def test_a_window_without_keys_is_refused(window: int) -> None:
    with pytest.raises(LayoutError, match=f"window={window}: it counts the query itself"):
        balanced_layout((0, 9), 2, window=window)
