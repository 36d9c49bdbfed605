"""What `auto` takes, and what each strategy sends."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from seqpar import comm
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_choice import Call, Strategy, choose
from seqpar.ops.softmax_tiles import Mask
from seqpar.ops.ulysses import head_shares
from tests.ops.softmax_cases import NAMES, Case, run_case
from tests.ops.softmax_reference import reference, visible
from tests.ranks import run_ranks
from tests.tolerances import relative_error


def _call(
    layout: SequenceLayout,
    *,
    strategy: Strategy = "auto",
    window: int | None = None,
    heads: int = 32,
    kv_heads: int = 0,
    keys: SequenceLayout | None = None,
) -> Call:
    return Call(
        layout=layout,
        key_layout=layout if keys is None else keys,
        is_cross=keys is not None,
        mask=Mask(causal=keys is None, window=window),
        strategy=strategy,
        ulysses_degree=None,
        batch=1,
        heads=heads,
        kv_heads=kv_heads or heads,
        key_dim=128,
        value_dim=128,
        item_bytes=2,
    )


def test_auto_follows_layout_mask_and_heads() -> None:
    n = 65536
    long_zigzag = SequenceLayout.zigzag((0, n), 8)
    assert choose(_call(long_zigzag)) == ("ring", 1)
    assert choose(_call(long_zigzag, window=512)) == ("halo", 1)
    short_documents = SequenceLayout.contiguous(range(0, n + 1, 256), 8)
    assert choose(_call(short_documents)) == ("ring", 1)
    # Unbalanced, so that the ring is as slow as the last rank: trade heads if there are enough.
    contiguous = SequenceLayout.contiguous((0, n), 8)
    assert choose(_call(contiguous)) == ("ulysses", 8)
    assert choose(_call(contiguous, heads=4)) == ("ring", 1)
    assert choose(_call(SequenceLayout.zigzag((0, n), 1))) == ("ring", 1)
    # Under a window the same layout is nearly balanced.
    assert choose(_call(contiguous, window=512)) == ("halo", 1)
    # So short that the ring would wait for its blocks, unless few heads make them small.
    short = SequenceLayout.zigzag((0, 4096), 8)
    assert choose(_call(short)) == ("ulysses", 8)
    assert choose(_call(short, kv_heads=1)) == ("ring", 1)


def test_auto_of_cross_attention_counts_keys_where_they_live() -> None:
    uneven = [0, 134, 262, *range(389, 1025, 127)]
    queries = SequenceLayout((0, 1024), [[span] for span in itertools.pairwise(uneven)])
    keys = SequenceLayout.contiguous((0, 65536), 8)
    assert choose(_call(queries, keys=keys)) == ("ulysses", 8)  # 32 heads of 65,536 keys to fetch
    # The busiest rank has 5% more work than the mean, and trading many keys would cost more.
    assert choose(_call(queries, keys=keys, kv_heads=4)) == ("ring", 1)


def test_usp_sends_no_key_head_twice_unless_told_to() -> None:
    layout = SequenceLayout.zigzag((0, 64), 8)
    assert choose(_call(layout, strategy="usp", heads=12, kv_heads=4)) == ("usp", 4)
    assert choose(_call(layout, strategy="usp", heads=12, kv_heads=6)) == ("usp", 2)
    told = replace(_call(layout, strategy="usp", kv_heads=2), ulysses_degree=8)
    assert choose(told) == ("usp", 8)


@pytest.mark.parametrize("degree", [1, 2, 3, 5, 8])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 8), (8, 2), (9, 3), (12, 2), (8, 1), (11, 11)])
def test_each_head_has_its_key_head(heads: int, kv_heads: int, degree: int) -> None:
    shares = head_shares(heads, kv_heads, degree)
    per_group = heads // kv_heads
    sizes = []
    for (start, stop), (k_start, k_stop), repeats in zip(
        shares.queries, shares.keys, shares.repeats, strict=True
    ):
        counts = repeats or [(stop - start) // (k_stop - k_start)] * (k_stop - k_start)
        reads = [k_start + i for i, count in enumerate(counts) for _ in range(count)]
        assert reads == [head // per_group for head in range(start, stop)]
        sizes.append(stop - start)
    assert sum(sizes) == heads
    assert max(sizes) - min(sizes) <= 1


def _sent(rank: int, cases: list[Case]) -> list[int]:
    sent = []
    for case in cases:
        with comm.count_traffic() as traffic:
            run_case(rank, case)
        assert set(traffic.operations) <= {"exchange"}
        sent.append(traffic["exchange"].sent_bytes)
    return sent


def test_bytes_of_each_strategy() -> None:
    """Forward and backward, 4 ranks of 16 tokens, H = 4, G = 2, K = V = 8, float32."""
    contiguous = SequenceLayout.contiguous((0, 64), 4)
    cases = [
        Case(contiguous, strategy, window=window, options={"check": False})
        for strategy, window in (("gather", None), ("halo", 5), ("ulysses", None), ("usp", None))
    ]
    cases.append(replace(cases[2], heads=8, kv_heads=4))
    gather, halo, ulysses, usp, grouped = zip(*run_ranks(4, _sent, cases), strict=True)
    token = 2 * (8 + 8) * 4  # bytes of one token's keys and values
    # Rank r's 16 tokens go to the ranks after it; the gradients of what it fetched go back.
    assert list(gather) == [16 * token * ((3 - rank) + rank) for rank in range(4)]
    # Four tokens to the right neighbour, which keeps them; four gradients to the left one.
    assert list(halo) == [4 * token, 8 * token, 8 * token, 4 * token]
    # One query head and the key/value head that it reads to each other rank; out back; twice.
    assert list(ulysses) == [2 * 3 * 16 * (8 + 8 + 8 + 8) * 4] * 4
    # Two query heads, which share a key/value head: that goes once.
    assert list(grouped) == [2 * 3 * 16 * (16 + 16 + 8 + 8) * 4] * 4
    # The neighbour's half of the heads, there and back; 32 tokens of the own key/value head to the
    # other two neighbours, or their gradients back.
    assert list(usp) == [(2 * 16 * (16 + 16 + 8 + 8) + 32 * (8 + 8)) * 4] * 4


def test_error_of_eight_ranks_is_within_twice_one_device() -> None:
    """bfloat16: what blocks and merges add to the rounding of one kernel."""
    ring = Case(SequenceLayout.zigzag((0, 512), 8), dtype=torch.bfloat16, key_dim=32, value_dim=32)
    one = replace(ring, layout=SequenceLayout.zigzag((0, 512), 1))
    streams = one.streams(seed=3)
    sees = visible((0, 512), causal=True, window=None)
    expected = reference(*streams, sees, 32**-0.5)
    alone = run_case(0, one, 3)
    shards = run_ranks(8, run_case, ring, 3)
    for i, ref in enumerate(expected):
        whole = ring.layout.unshard([shard[i] for shard in shards])
        assert relative_error(whole, ref) <= 2 * relative_error(alone[i], ref), NAMES[i]
