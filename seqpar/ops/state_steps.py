"""Forward and backward of a scattered mixer as steps: the order of local work and communication.

Legend: B batch, T tokens on this rank, D documents.
"""

from __future__ import annotations

from torch import Tensor

from seqpar.ops.state_exchange import EXCHANGES
from seqpar.ops.state_heads import backward_by_heads, forward_by_heads
from seqpar.ops.state_job import Forward, Kept, StateJob
from seqpar.ops.state_lean import lean_backward, lean_forward
from seqpar.ops.state_mixer import Inputs
from seqpar.ops.steps import AllReduceSum, Beside, Steps

__all__ = ["backward_steps", "forward_steps"]


def forward_steps(job: StateJob, inputs: Inputs, initial_state: Tensor | None) -> Steps[Forward]:
    """Outputs of the local tokens. `initial_state` is [B, *state_shape]."""
    if job.is_lean and initial_state is None:
        return (yield from lean_forward(job, inputs))
    part = job.part
    if job.exchange == "all_to_all":
        return (yield from forward_by_heads(job, inputs, initial_state))
    summary = part.summarize(inputs)
    scan = part.forward_scan(inputs, summary, initial_state)
    steps = EXCHANGES[job.exchange](scan)
    if part.plan.adds_later:
        here = part.entries({}, initial_state)
        received, o = yield Beside(steps, lambda: part.output(inputs, summary, here), scan)
        part.add_entries(o, inputs, received)
        entries = {**here, **received}
    else:
        entries = part.entries((yield from steps), initial_state)
        o = part.output(inputs, summary, entries)
    finals = None
    if job.return_final_state:
        finals = yield AllReduceSum(part.final_states(inputs, summary, entries))
    return Forward(o, finals, Kept(inputs, summary, entries))


def backward_steps(
    job: StateJob,
    kept: Kept,
    do: Tensor,
    dfinals: Tensor | None,
    *,
    wants_initial_grad: bool = True,
) -> Steps[tuple[tuple[Tensor | None, ...], Tensor | None]]:
    """Gradients of the local inputs, and of the initial state [B, *state_shape] (None: zero).

    `dfinals` [B, D, *state_shape] is this rank's; the final states are on every rank, so their
    gradient is the sum of what ranks put in.
    """
    if job.return_final_state and dfinals is not None:
        dfinals = yield AllReduceSum(dfinals)
    if job.exchange == "all_to_all":
        return (yield from backward_by_heads(job, kept, do, dfinals))
    if dfinals is None and not wants_initial_grad and job.is_lean:
        return (yield from lean_backward(job, kept, do)), None
    part, inputs = job.part, kept.inputs
    grad_summary = part.summarize_grad(inputs, do, kept.summary, kept.entries)
    scan = part.backward_scan(inputs, grad_summary, dfinals)
    steps = EXCHANGES[job.exchange](scan)
    local = (inputs, do, kept.summary, grad_summary, kept.entries)
    if part.plan.adds_later:
        received, dinputs = yield Beside(steps, lambda: part.backward(*local, {}, dfinals), scan)
        exit_grads = part.exit_grads(received)
        part.add_exit_grads(dinputs, inputs, exit_grads)
    else:
        exit_grads = part.exit_grads((yield from steps))
        dinputs = part.backward(*local, exit_grads, dfinals)
    dinitial = None
    if wants_initial_grad:
        dinitial = part.initial_state_grad(grad_summary, exit_grads, dfinals)
    return dinputs, dinitial
