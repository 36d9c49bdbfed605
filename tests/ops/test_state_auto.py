"""What `auto` asks of the time model, what it answers, and what a call makes of that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar import comm
from seqpar.errors import LayoutError
from seqpar.layout import SequenceLayout
from seqpar.ops.state import explain_exchange, state_attention
from seqpar.ops.state_call import MIN_OVERLAP_MS, call_plan
from seqpar.ops.state_exchange import EXCHANGES
from seqpar.ops.state_lightning import LightningMixer, fixed_on_host
from seqpar.planners.exchange import ETHERNET_LOOPBACK, ExchangeChoice, Link
from tests.ops.cases import HEADS, KEY_DIM, VALUE_DIM, make_stream
from tests.ranks import run_ranks

BATCH = 2
FIVE = SequenceLayout.contiguous((0, 61), 5)
STATE_BYTES = BATCH * HEADS * KEY_DIM * VALUE_DIM * 4
SLOW = Link("a slow link", 300.0, 400.0, 100.0, 1.0)
QUICK = Link("a quick link", 1.0, 1.0, 1.0, 1000.0)


def _explained(
    layout: SequenceLayout, decay: Tensor | None = None, *, per_token: bool = False, **options: Any
) -> ExchangeChoice:
    kind = "per token" if per_token else "none"
    stream = make_stream(layout.cu_seqlens, kind, batch=BATCH, dtype=torch.float32)
    q, k, v, *decays = (layout.shard(x, 0) for x in stream.tensors)
    log_decay = decays[0] if decays else decay
    return explain_exchange(q, k, v, log_decay=log_decay, layout=layout, group=None, **options)


@pytest.mark.parametrize(
    ("layout", "reach", "links"),
    [
        (FIVE, 4, 1),
        (SequenceLayout.contiguous((0, 30, 61), 5), 2, 1),
        (SequenceLayout.contiguous((0, 13, 25, 37, 49, 61), 5), 1, 1),
        (SequenceLayout.contiguous((0, 12, 24, 36, 48, 60), 5), 0, 1),
        (SequenceLayout.zigzag((0, 61), 5), 8, 2),
        (SequenceLayout.contiguous((0, 61), 1), 0, 1),
    ],
)
def test_the_model_is_asked_of_this_layout(layout: SequenceLayout, reach: int, links: int) -> None:
    problem = _explained(layout).problem
    assert (problem.world_size, problem.reach) == (layout.world_size, reach)
    assert problem.links_per_rank == links
    assert problem.state_bytes == STATE_BYTES
    assert problem.tokens == BATCH * max(map(layout.tokens_on, range(layout.world_size)))
    assert problem.token_bytes == 4 * HEADS * (2 * KEY_DIM + 2 * VALUE_DIM)
    assert problem.heads == HEADS


def test_the_model_is_asked_of_these_decays() -> None:
    layout = SequenceLayout.contiguous((0, 60), 5)  # links of 12 tokens, and 24 ln 2 is 16.6
    decay = torch.tensor([0.0, -1.3, -1.5])
    assert _explained(layout).problem.far_share == 1.0
    assert _explained(layout, decay).problem.far_share == pytest.approx(2 / 3)
    assert _explained(layout, decay, truncate=False).problem.far_share == 1.0
    by_token = _explained(layout, per_token=True).problem
    assert by_token.far_share == 1.0
    assert by_token.state_bytes == STATE_BYTES + BATCH * HEADS * 4
    assert by_token.token_bytes == 4 * HEADS * (2 * KEY_DIM + 2 * VALUE_DIM + 1)


def test_the_choice_can_be_printed() -> None:
    choice = _explained(FIVE, link=SLOW)
    assert choice.exchange == min(choice.estimates_ms, key=choice.estimates_ms.__getitem__)
    head, *rows = str(choice).splitlines()
    assert head.startswith(f"{choice.exchange}: 5 ranks over a slow link")
    assert [row.split() for row in rows] == [
        [name, f"{ms:.3f}", "ms"] for name, ms in choice.estimates_ms.items()
    ]
    assert {*EXCHANGES, "all_to_all"} == set(choice.estimates_ms)
    short = torch.zeros(1, 3, HEADS, KEY_DIM)
    with pytest.raises(LayoutError, match="gives this rank 12 tokens"):
        explain_exchange(short, short, short, log_decay=None, layout=FIVE, group=None)


@pytest.mark.parametrize("overlap", [None, True, False])
@pytest.mark.parametrize("link", [SLOW, QUICK], ids=lambda link: link.name)
def test_states_are_added_later_where_the_exchange_takes_long(
    link: Link, overlap: bool | None
) -> None:
    layout, decay = SequenceLayout.contiguous((0, 800), 2), torch.full((HEADS,), -2.0)
    stream = make_stream(layout.cu_seqlens, "none", dtype=torch.float32)
    inputs = tuple(layout.shard(x, 0) for x in stream.tensors)
    kind = LightningMixer(decay, on_host=fixed_on_host(decay)).kind(inputs)
    shapes = tuple((x.shape, x.dtype) for x in inputs)
    plan = call_plan(
        kind, layout, (2, 0), shapes, torch.device("cpu"), None, "chain", overlap, link
    ).rank_plan
    assert plan is not None
    estimate = explain_exchange(
        *inputs, log_decay=decay, layout=layout, group=None, link=link
    ).estimates_ms["chain"]
    assert plan.adds_later == (estimate >= MIN_OVERLAP_MS if overlap is None else overlap)
    assert (estimate >= MIN_OVERLAP_MS) == (link is SLOW)


HEAVY_STATES = Link("bytes cost most", 0.0, 0.0, 0.0, 1e-6)


def _auto(rank: int, layout: SequenceLayout, link: Link) -> tuple[set[str], str]:
    stream = make_stream(layout.cu_seqlens, "none", dtype=torch.float32)
    q, k, v = (layout.shard(x, rank) for x in stream.tensors)
    how: dict[str, Any] = {"log_decay": None, "layout": layout, "group": dist.group.WORLD}
    with comm.count_traffic() as traffic:
        state_attention(q, k, v, **how, link=link, check=False)
    return set(traffic.operations), explain_exchange(q, k, v, **how, link=link).exchange


@pytest.mark.parametrize(
    ("make", "link", "exchange"),
    [
        (SequenceLayout.contiguous, ETHERNET_LOOPBACK, "all_gather"),
        (SequenceLayout.zigzag, HEAVY_STATES, "pipelined_chain"),
    ],
)
def test_auto_uses_what_explain_says(
    make: Callable[..., SequenceLayout], link: Link, exchange: str
) -> None:
    for used, said in run_ranks(3, _auto, make((0, 61), 3), link):
        assert said == exchange
        assert used == {"all_gather" if said == "all_gather" else "exchange"}
