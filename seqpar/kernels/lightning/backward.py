"""Backward on Triton: output passes with exchanged roles, and two passes for the states.

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
from seqpar.kernels.lightning.launch_output import output_pass
from seqpar.kernels.lightning.tuning import configuration

__all__ = ["backward_triton", "empty_entry_grad"]


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
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    local_states, scanned = states.into(entry_state, reverse=False)
    output_pass(
        (do, v, k),
        dq,
        states.decays,
        states.segments,
        configuration(v.shape[3], q.shape[3], q.dtype),
        states=local_states,
        scanned=scanned,
        initial=None if scanned else entry_state,
        reverse=False,
        transposed=True,
    )
    entry_grad = empty_entry_grad(prepared) if return_entry_grad else None
    dk, dv = key_value_gradients(prepared, grad_states, exit_state_grad, entry_grad)
    return dq, dk, dv, entry_grad


def key_value_gradients(
    prepared: Prepared,
    grad_states: SegmentStates,
    exit_state_grad: Tensor | None,
    entry_grad: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """dk and dv."""
    q, k, v, do = prepared.tensors
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    local_states, scanned = grad_states.into(exit_state_grad, reverse=True)
    for roles, out, final in (((k, q, do), dv, entry_grad), ((v, do, q), dk, None)):
        output_pass(
            roles,
            out,
            grad_states.decays,
            grad_states.segments,
            configuration(roles[0].shape[3], roles[2].shape[3], q.dtype),
            states=local_states,
            scanned=scanned,
            initial=None if scanned else exit_state_grad,
            final=final,
            reverse=True,
            transposed=out is dk,
        )
    return dk, dv


def empty_entry_grad(prepared: Prepared) -> Tensor:
    """[S, H, K, V] float32, to be written."""
    q, _, v, _ = prepared.tensors
    shape = (len(prepared.bounds) - 1, q.shape[2], q.shape[3], v.shape[3])
    return torch.empty(shape, dtype=torch.float32, device=q.device)
