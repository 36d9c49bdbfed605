"""The common case, straight through: one run on this rank, and one all_gather each way.

Legend: B batch, T tokens on this rank.

What `state_steps` and `state_local` do for any layout and exchange, these do for a rank whose
tokens belong to one document and are one span, with no state in or out. They ask for the same
messages as the general steps, so ranks of one group may take either.
"""

from __future__ import annotations

from torch import Tensor

from seqpar.ops.state_gather import entry_of
from seqpar.ops.state_job import Forward, Kept, StateJob
from seqpar.ops.state_mixer import Inputs
from seqpar.ops.steps import AllGather, Steps

__all__ = ["lean_backward", "lean_forward"]


def lean_forward(job: StateJob, inputs: Inputs) -> Steps[Forward]:
    """As `forward_steps`."""
    mixer, scan = job.part.mixer, job.part.plan.forward_scan
    summary = mixer.summarize(inputs, None)
    entry = None
    if scan.chain.is_connected:
        gathered = yield AllGather(summary.state)
        entry = entry_of(scan, gathered, mixer.log_decay_per_token)
    o = mixer.output(inputs, summary, entry, None)
    entries = {} if entry is None else {scan.own_links[0]: entry}
    return Forward(o, None, Kept(inputs, summary, entries))


def lean_backward(job: StateJob, kept: Kept, do: Tensor) -> Steps[tuple[Tensor | None, ...]]:
    """Gradients of the inputs, as `backward_steps` has them."""
    mixer, scan, summary = job.part.mixer, job.part.plan.backward_scan, kept.summary
    assert summary is not None, "a rank with a run has tokens"
    entry = next(iter(kept.entries.values()), None)
    grad_summary = mixer.summarize_grad(kept.inputs, do, summary, entry, None)
    exit_grad = None
    if scan.chain.is_connected:
        gathered = yield AllGather(grad_summary.state)
        exit_grad = entry_of(scan, gathered, mixer.log_decay_per_token)
    return mixer.backward(kept.inputs, do, summary, grad_summary, entry, exit_grad, None)
