"""An exchange may run on a stream of its own, all queued before the work beside it begins."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from seqpar.layout import SequenceLayout
from seqpar.ops.state_job import Kept, StateJob
from seqpar.ops.state_lightning import LightningMixer
from seqpar.ops.state_local import RankPart
from seqpar.ops.state_steps import backward_steps, forward_steps
from seqpar.ops.steps import AllGather, Beside, Steps
from tests.ops.cases import HEADS, KEY_DIM, VALUE_DIM, Stream, make_stream

TOKENS = 400
LAYOUT = SequenceLayout.contiguous((0, TOKENS), 2)
STATES = (1, HEADS, KEY_DIM, VALUE_DIM)


def _job(stream: Stream, rank: int) -> tuple[StateJob, tuple[Tensor, ...]]:
    """A rank whose heads decay so fast that states are added after the local work."""
    decay = torch.full((HEADS,), -1.0)
    mixer = LightningMixer(decay, on_host=tuple(decay.tolist()))
    inputs = tuple(LAYOUT.shard(x, rank) for x in stream.tensors)
    return StateJob(RankPart.of(mixer, LAYOUT, rank, inputs), "all_gather", True), inputs


def _sent_when_all_is_queued(exchange: Steps[Any]) -> weakref.ref[Tensor]:
    """Run the steps to their end, as for a stream that has not begun to send."""
    request = next(exchange)
    assert isinstance(request, AllGather)
    gathered = request.message.new_zeros(2, *request.message.shape)
    sent = weakref.ref(request.message)
    del request
    try:
        exchange.send(gathered)
    except StopIteration:
        return sent
    raise AssertionError("one all_gather was all")


def test_a_state_that_is_sent_is_held_while_outputs_are_made() -> None:
    stream = make_stream((0, TOKENS), "fixed", batch=1, dtype=torch.float32)
    job, inputs = _job(stream, 0)
    request = next(forward_steps(job, inputs, torch.ones(STATES)))
    assert isinstance(request, Beside)
    assert _sent_when_all_is_queued(request.exchange)() is not None


def test_a_gradient_that_is_sent_is_held_while_gradients_are_made() -> None:
    stream = make_stream((0, TOKENS), "fixed", batch=1, dtype=torch.float32)
    job, inputs = _job(stream, 1)
    kept = Kept(inputs, job.part.summarize(inputs), {})
    do = LAYOUT.shard(stream.do, 1)
    steps = backward_steps(job, kept, do, torch.ones(1, *STATES))
    next(steps)
    request = steps.send(torch.ones(1, *STATES))  # the sum over ranks of what they put in
    assert isinstance(request, Beside)
    assert _sent_when_all_is_queued(request.exchange)() is not None
