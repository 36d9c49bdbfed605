"""The common case, straight through: one run on this rank, and one all_gather each way.

Legend: B batch, T tokens on this rank.

What `state_steps` and `state_local` do for any layout and exchange, these do for a rank whose
tokens belong to one document and are one span, with no state in or out. They ask for the same
messages as the general steps, so ranks of one group may take either. A rank whose state nobody
takes does not make it; and in backward, if nobody waits for it, such a rank queues dq before it
waits. A collective would hold up its peers for as long.
"""

from __future__ import annotations

from torch import Tensor

from seqpar.ops.state_gather import entry_of, gathering
from seqpar.ops.state_job import Forward, Kept, StateJob
from seqpar.ops.state_mixer import Inputs, Summary
from seqpar.ops.steps import Steps

__all__ = ["lean_backward", "lean_forward"]


def lean_forward(job: StateJob, inputs: Inputs) -> Steps[Forward]:
    """As `forward_steps`."""
    mixer, scan = job.part.mixer, job.part.plan.forward_scan
    summary = mixer.summarize(inputs, None) if scan.gives else mixer.summarize_within(inputs)
    entry = None
    if scan.chain.is_connected:
        gathered = yield gathering(scan, summary.state)
        entry = entry_of(scan, gathered, mixer.log_decay_per_token)
    o = mixer.output(inputs, summary, entry, None)
    entries = {} if entry is None else {scan.own_links[0]: entry}
    return Forward(o, None, Kept(inputs, summary, entries))


def lean_backward(job: StateJob, kept: Kept, do: Tensor) -> Steps[tuple[Tensor | None, ...]]:
    """Gradients of the inputs, as `backward_steps` has them."""
    mixer, scan, summary = job.part.mixer, job.part.plan.backward_scan, kept.summary
    assert summary is not None, "a rank with a run has tokens"
    entry = next(iter(kept.entries.values()), None)
    local = (kept.inputs, do, summary, entry)
    if scan.gives:
        grad_summary = mixer.summarize_grad(*local, None)
    else:
        grad_summary = mixer.summarize_grad_within(*local)
    if job.takes_late and not scan.gives:
        finish = mixer.begin_backward(*local)
        exit_grad = yield from _exit_grad(job, grad_summary)
        return finish(grad_summary, exit_grad)
    exit_grad = yield from _exit_grad(job, grad_summary)
    return mixer.backward(kept.inputs, do, summary, grad_summary, entry, exit_grad, None)


def _exit_grad(job: StateJob, grad_summary: Summary) -> Steps[Tensor | None]:
    """The gradient of the state that leaves this rank."""
    scan = job.part.plan.backward_scan
    if not scan.chain.is_connected:
        return None
    gathered = yield gathering(scan, grad_summary.state)
    return entry_of(scan, gathered, job.part.mixer.log_decay_per_token)
