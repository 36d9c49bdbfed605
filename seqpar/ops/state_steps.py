"""Forward and backward of a scattered mixer as steps: the order of local work and communication.

Legend: B batch, T tokens on this rank, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.ops.state_exchange import EXCHANGES, Entries
from seqpar.ops.state_local import RankPart
from seqpar.ops.state_mixer import Inputs, Summary
from seqpar.ops.steps import AllReduceSum, Steps

__all__ = ["Forward", "StateJob", "backward_steps", "forward_steps"]


@dataclass(frozen=True)
class StateJob:
    """One scattered mixer on one rank: what to compute, and how its states travel."""

    part: RankPart
    exchange: str
    return_final_state: bool


@dataclass(frozen=True)
class Forward:
    """What the forward steps leave: results, and what the backward steps want."""

    o: Tensor
    """[B, T, ...]."""
    final_states: Tensor | None
    """[B, D, *state_shape]."""
    summary: Summary | None
    entries: Entries


def forward_steps(job: StateJob, inputs: Inputs, initial_state: Tensor | None) -> Steps[Forward]:
    """Outputs of the local tokens. `initial_state` is [B, *state_shape]."""
    part, exchange = job.part, EXCHANGES[job.exchange]
    summary = part.summarize(inputs)
    received = yield from exchange(part.forward_scan(inputs, summary, initial_state))
    entries = part.entries(received, initial_state)
    o = part.output(inputs, summary, entries)
    finals = None
    if job.return_final_state:
        finals = yield AllReduceSum(part.final_states(inputs, summary, entries))
    return Forward(o, finals, summary, entries)


def backward_steps(
    job: StateJob,
    inputs: Inputs,
    summary: Summary | None,
    entries: Entries,
    do: Tensor | None,
    dfinals: Tensor | None,
) -> Steps[tuple[tuple[Tensor | None, ...], Tensor]]:
    """Gradients of the local inputs, and of the initial state [B, *state_shape]."""
    part, exchange = job.part, EXCHANGES[job.exchange]
    if do is None:
        do = torch.zeros_like(part.mixer.empty_output(inputs))
    if job.return_final_state:
        if dfinals is None:
            dfinals = part.no_states(inputs, per_document=True)
        # The final states are on every rank: their gradient is the sum of what ranks put in.
        dfinals = yield AllReduceSum(dfinals)
    grad_summary = part.summarize_grad(inputs, do, summary, entries)
    received = yield from exchange(part.backward_scan(inputs, grad_summary, dfinals))
    exit_grads = part.exit_grads(received)
    dinputs = part.backward(inputs, do, summary, grad_summary, entries, exit_grads, dfinals)
    dinitial = part.initial_state_grad(grad_summary, exit_grads, dfinals)
    return dinputs, part.no_states(inputs) if dinitial is None else dinitial
