"""Backward on Triton: three output passes with exchanged roles, and two passes for the states.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences, M segments.

    states of (k, v) forward in time    -> entries A          (kept from the forward pass)
    states of (q, do) backward in time  -> entries E
    dq = output_pass(do, v, k; A) forward
    dv = output_pass(k, q, do; E) backward,  dk = output_pass(v, do, q; E) backward

No state of a chunk is ever written to memory: each pass carries its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar.kernels.lightning.forward import Prepared, SegmentStates
from seqpar.kernels.lightning.output_pass import output_pass
from seqpar.kernels.lightning.tuning import configuration

__all__ = ["backward_triton"]


def backward_triton(
    prepared: Prepared,
    states: SegmentStates,
    grad_states: SegmentStates,
    *,
    entry_state: Tensor | None,
    exit_state_grad: Tensor | None,
    return_entry_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv, and the gradient of the entry states [S, H, K, V] if asked for.

    `prepared` holds q, k, v, do; `states` are those of (k, v), `grad_states` those of (q, do).
    """
    q, k, v, do = prepared.tensors
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    entry_grad = None
    if return_entry_grad:
        shape = (len(prepared.bounds) - 1, q.shape[2], q.shape[3], v.shape[3])
        entry_grad = torch.empty(shape, dtype=torch.float32, device=q.device)
    decay = prepared.log_decay
    keys_out = configuration(v.shape[3], q.shape[3], q.dtype)
    values_out = configuration(q.shape[3], v.shape[3], q.dtype)
    output_pass(
        do,
        v,
        k,
        dq,
        decay,
        states.totals,
        states.segments,
        keys_out,
        entries=states.entries,
        initial=entry_state,
        final=None,
        reverse=False,
        transposed=True,
    )
    output_pass(
        k,
        q,
        do,
        dv,
        decay,
        grad_states.totals,
        grad_states.segments,
        values_out,
        entries=grad_states.entries,
        initial=exit_state_grad,
        final=entry_grad,
        reverse=True,
        transposed=False,
    )
    output_pass(
        v,
        do,
        q,
        dk,
        decay,
        grad_states.totals,
        grad_states.segments,
        keys_out,
        entries=grad_states.entries,
        initial=exit_state_grad,
        final=None,
        reverse=True,
        transposed=True,
    )
    return dq, dk, dv, entry_grad
