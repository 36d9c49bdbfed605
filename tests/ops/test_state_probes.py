"""What must not happen: states that leak, tokens that see later ones, ranks that hang."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.errors import LayoutError
from seqpar.layout import SequenceLayout
from seqpar.ops.state import state_attention
from seqpar.ops.state_exchange import EXCHANGES
from seqpar.ops.state_job import StateJob
from seqpar.ops.state_lightning import LightningMixer
from seqpar.ops.state_local import RankPart
from seqpar.ops.state_steps import backward_steps, forward_steps
from seqpar.ops.steps import Steps, Swap
from tests.ops.cases import Stream, layouts, make_stream
from tests.ranks import run_ranks
from tests.simulator import simulate

BOUNDS = (0, 9, 10, 26, 40)
NAMES = [*sorted(EXCHANGES), "all_to_all"]


def _forward(stream: Stream, layout: SequenceLayout, exchange: str) -> Tensor:
    ranks = range(layout.world_size)
    mixer = LightningMixer(stream.log_decay)
    inputs = [tuple(layout.shard(x, r) for x in stream.tensors) for r in ranks]
    jobs = [StateJob(RankPart.of(mixer, layout, r, inputs[r]), exchange, False) for r in ranks]
    done = simulate([forward_steps(jobs[r], inputs[r], None) for r in ranks])
    return layout.unshard([item.o for item in done])


def _backward(stream: Stream, layout: SequenceLayout, exchange: str) -> list[Tensor]:
    """Gradients of q, k and v."""
    ranks = range(layout.world_size)
    mixer = LightningMixer(stream.log_decay)
    inputs = [tuple(layout.shard(x, r) for x in stream.tensors) for r in ranks]
    jobs = [StateJob(RankPart.of(mixer, layout, r, inputs[r]), exchange, False) for r in ranks]
    done = simulate([forward_steps(jobs[r], inputs[r], None) for r in ranks])
    steps = [backward_steps(jobs[r], done[r].kept, layout.shard(stream.do, r), None) for r in ranks]
    found = [grads for grads, _ in simulate(steps)]
    return [layout.unshard(list(parts)) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("exchange", NAMES)
def test_a_document_moves_no_other(exchange: str) -> None:
    stream = make_stream(BOUNDS, "fixed")
    for layout in layouts(BOUNDS, 4).values():
        before = _forward(stream, layout, exchange)
        for start, stop in ((0, 9), (9, 10), (10, 26)):
            k, v = stream.k.clone(), stream.v.clone()
            # Not a number shows up wherever it is so much as multiplied by zero.
            k[:, start:stop], v[:, start:stop] = torch.nan, torch.nan
            after = _forward(replace(stream, k=k, v=v), layout, exchange)
            assert torch.equal(after[:, :start], before[:, :start])
            assert torch.equal(after[:, stop:], before[:, stop:])
            assert after[:, start:stop].isnan().all()


@pytest.mark.parametrize("exchange", NAMES)
def test_a_gradient_moves_no_other_document(exchange: str) -> None:
    stream = make_stream(BOUNDS, "fixed")
    for layout in layouts(BOUNDS, 4).values():
        before = _backward(stream, layout, exchange)
        for start, stop in ((9, 10), (10, 26)):
            do = stream.do.clone()
            do[:, start:stop] = torch.nan
            after = _backward(replace(stream, do=do), layout, exchange)
            for grad, was in zip(after, before, strict=True):
                assert torch.equal(grad[:, :start], was[:, :start])
                assert torch.equal(grad[:, stop:], was[:, stop:])
                assert grad[:, start:stop].isnan().all()


@pytest.mark.parametrize("exchange", NAMES)
def test_no_token_sees_a_later_one(exchange: str) -> None:
    bounds = (0, 24)
    stream = make_stream(bounds, "fixed")
    for layout in layouts(bounds, 4).values():
        before = _forward(stream, layout, exchange)
        for position in (5, 6, 17):
            k = stream.k.clone()
            k[:, position] += 1.0
            after = _forward(replace(stream, k=k), layout, exchange)
            assert torch.equal(after[:, :position], before[:, :position])
            assert not torch.equal(after[:, position], before[:, position])
            assert not torch.equal(after[:, position + 1], before[:, position + 1])


def _watched(steps: Steps[Any], swaps: list[tuple[int, int]]) -> Steps[Any]:
    """The same steps; notes how many messages each request sends and receives."""
    delivered = None
    while True:
        try:
            request = steps.send(delivered)
        except StopIteration as stop:
            return stop.value
        assert isinstance(request, Swap)
        swaps.append((len(request.sends), len(request.recvs)))
        delivered = yield request


def test_a_slice_is_sent_on_while_the_next_one_arrives() -> None:
    layout, ranks = SequenceLayout.contiguous((0, 24), 4), range(4)
    stream = make_stream((0, 24), "fixed")
    rounds: dict[str, list[list[tuple[int, int]]]] = {}
    for exchange in ("chain", "pipelined_chain"):
        mixer, seen = LightningMixer(stream.log_decay), rounds.setdefault(exchange, [])
        inputs = [tuple(layout.shard(x, r) for x in stream.tensors) for r in ranks]
        jobs = [StateJob(RankPart.of(mixer, layout, r, inputs[r]), exchange, False) for r in ranks]
        seen.extend([] for _ in ranks)
        simulate([_watched(forward_steps(jobs[r], inputs[r], None), seen[r]) for r in ranks])
    assert rounds["chain"] == [[(1, 0)], [(0, 1), (1, 0)], [(0, 1), (1, 0)], [(0, 1)]]
    both = [(0, 1), (1, 1), (1, 1), (1, 1), (1, 0)]  # KEY_DIM slices
    assert rounds["pipelined_chain"] == [[(1, 0)] * 4, both, both, [(0, 1)] * 4]


# -- refusals ---------------------------------------------------------------------------------


def _refused(rank: int) -> list[str]:
    layout = SequenceLayout.contiguous((0, 8), 2)
    other = SequenceLayout.contiguous((0, 3, 8), 2)
    stream = make_stream((0, 8), "none", dtype=torch.float32)
    q, k, v = (layout.shard(x, rank) for x in stream.tensors)
    group, messages = dist.group.WORLD, []

    def attend(q: Tensor, layout: SequenceLayout, exchange: str) -> None:
        with pytest.raises(LayoutError) as caught:
            state_attention(q, k, v, log_decay=None, layout=layout, group=group, exchange=exchange)
        messages.append(str(caught.value))

    attend(q[:, : 4 - rank], layout, "auto")
    attend(q if rank else q.expand(2, -1, -1, -1), layout, "auto")
    attend(q if rank else q[0, 0], layout, "auto")
    attend(q, layout if rank else other, "auto")
    attend(q, SequenceLayout.contiguous((0, 8), 3), "auto")
    attend(q, layout, "pigeon")
    return messages


def test_what_does_not_fit_is_refused_on_all_ranks_alike() -> None:
    for messages in run_ranks(2, _refused):
        assert "rank 1 has shape (1, 3" in messages[0]
        assert "input 0 has 2 rows: expand" in messages[1]
        assert "must be [B, T, ...]" in messages[2]
        assert "not given the same" in messages[3]
        assert "over 3 ranks, but the group has 2" in messages[4]
        assert "no exchange 'pigeon'" in messages[5]
