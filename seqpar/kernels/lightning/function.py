"""Lightning attention as callers see it: one differentiable function, and the pieces it is made of.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences (B, or packed documents).

The pieces let a caller put communication between them: the summary of the local keys and values
can leave for other ranks before any output exists, and the outputs follow once the entry state is
known. `lightning_attention` is the pieces put together for one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.errors import KernelInputError
from seqpar.kernels.lightning import dispatch
from seqpar.kernels.lightning.dispatch import LocalStates
from seqpar.kernels.lightning.inputs import check_inputs, check_state, state_dtype

__all__ = [
    "Summary",
    "attend",
    "attend_backward",
    "key_value_summary",
    "lightning_attention",
    "lightning_step",
    "query_grad_summary",
]


@dataclass(frozen=True)
class Summary:
    """What local tokens do to a state that passes through them: it is decayed and added to.

    state that leaves = exp(log_transition) * state that enters + final_state. Read backward in
    time for `query_grad_summary`: gradient that reaches the entry = exp(log_transition) *
    gradient of the exit state + final_state.
    """

    final_state: Tensor
    """[S, H, K, V] float32: the result for zero in."""
    log_transition: Tensor
    """[S, H] float32: the total log decay, <= 0."""
    local_states: LocalStates | None = None
    """What `attend` and `attend_backward` can use again; private to the kernels."""


def lightning_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention with decay: S_t = exp(g_t) S_(t-1) + k_tᵀ v_t, o_t = q_t S_t.

    There is no scale: scale q. Differentiable in q, k, v, initial_state and per-token log_decay,
    through o and the final state.

    Args:
        q, k: [B, T, H, K] float16, bfloat16 or float32 (float64 on CPU); K from 1 to 256.
        v: [B, T, H, V] like them; V from 1 to 256. T may be 0.
        log_decay: natural logarithms <= 0: None (no decay), [H] float32 (fixed per head, a
            constant) or [B, T, H] float32 (per token). Values under -100 act as -100.
        cu_seqlens: int32 [S + 1], bounds of documents packed into one row (B = 1), from 0 to T.
            On a CUDA device, pass it on the CPU to spare a synchronisation.
        initial_state: [S, H, K, V] float32, the state before each sequence's first token.
        return_final_state: also return the state after each sequence's last token.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [S, H, K, V] float32 or None.

    Raises:
        KernelInputError: shapes, dtypes, devices or bounds that do not fit, before any launch.

    Source: Qin et al., arXiv 2405.17381 (eq. 8 to 13); Dao and Gu, arXiv 2405.21060, for decay
    per token.
    """
    check_inputs(k, v, queries=q, log_decay=log_decay, cu_seqlens=cu_seqlens)
    check_state(initial_state, k, v, _num_sequences(k, cu_seqlens))
    o, final_state = _LightningAttention.apply(  # type: ignore[no-untyped-call]
        q, k, v, log_decay, initial_state, cu_seqlens, return_final_state
    )
    return o, final_state


class _LightningAttention(torch.autograd.Function):
    """
    |          | in                                   | out                                   |
    | forward  | q, k, v, log_decay, initial_state    | o, final_state                        |
    | backward | do, dfinal_state                     | dq, dk, dv, dlog_decay, dinitial      |

    Saves its inputs only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        cu_seqlens: Tensor | None,
        return_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        o, final_state, ctx.local_states = dispatch.forward(
            q, k, v, log_decay, cu_seqlens, initial_state, return_final_state
        )
        ctx.save_for_backward(q, k, v, log_decay, initial_state)
        ctx.cu_seqlens = cu_seqlens
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, log_decay, initial_state = ctx.saved_tensors
        do, dfinal = grads
        do = torch.zeros_like(v) if do is None else do
        needs = dispatch.Needs(
            decay_grad=ctx.needs_input_grad[3], entry_grad=ctx.needs_input_grad[4]
        )
        dq, dk, dv, dlog_decay, dinitial = dispatch.backward(
            (q, k, v, do),
            log_decay,
            ctx.cu_seqlens,
            initial_state,
            dfinal,
            states=ctx.local_states,
            grad_states=None,
            needs=needs,
        )
        if dlog_decay is not None and log_decay is not None:
            dlog_decay = dlog_decay.to(log_decay.dtype)
        if initial_state is None or dinitial is None:
            dinitial = None  # nothing was given, so nothing may come back
        else:
            dinitial = dinitial.to(initial_state.dtype)
        return dq, dk, dv, dlog_decay, dinitial, None, None


def key_value_summary(
    k: Tensor, v: Tensor, *, log_decay: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Summary:
    """What the local keys and values do to a passing state, without any output.

    Args: as for `lightning_attention`. Not differentiable by autograd: `attend_backward` is the
    backward of `attend` and this together.
    """
    check_inputs(k, v, log_decay=log_decay, cu_seqlens=cu_seqlens)
    with torch.no_grad():
        state, local = dispatch.summary(k, v, log_decay, cu_seqlens, reverse=False)
        return Summary(state, _log_transition(k, log_decay, cu_seqlens), local)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    summary: Summary,
    *,
    log_decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entry_state: Tensor | None = None,
) -> Tensor:
    """Outputs [B, T, H, V] of the local tokens, given the states [S, H, K, V] that enter them.

    Args: as for `lightning_attention`; `summary` is `key_value_summary` of the same k, v,
    log_decay and cu_seqlens.
    """
    check_inputs(k, v, queries=q, log_decay=log_decay, cu_seqlens=cu_seqlens)
    _check_summary(summary, k, v, cu_seqlens)
    check_state(entry_state, k, v, _num_sequences(k, cu_seqlens))
    with torch.no_grad():
        return dispatch.attend(q, k, v, log_decay, cu_seqlens, entry_state, summary.local_states)


def query_grad_summary(
    q: Tensor, do: Tensor, *, log_decay: Tensor | None = None, cu_seqlens: Tensor | None = None
) -> Summary:
    """The gradient of the entry state that comes from local outputs alone, and its transition.

    Args: q [B, T, H, K] and do [B, T, H, V]; the rest as for `lightning_attention`.
    """
    check_inputs(q, do, log_decay=log_decay, cu_seqlens=cu_seqlens)
    with torch.no_grad():
        grad, local = dispatch.summary(q, do, log_decay, cu_seqlens, reverse=True)
        return Summary(grad, _log_transition(q, log_decay, cu_seqlens), local)


def attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    summary: Summary,
    grad_summary: Summary,
    *,
    log_decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    entry_state: Tensor | None = None,
    exit_state_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the local q, k, v and per-token log_decay.

    Args: as for `lightning_attention`, with do [B, T, H, V], the summaries of (k, v) and (q, do),
    the states that enter, and the gradients of the states that leave, [S, H, K, V] float32 each
    (None: zero). The gradient of the entry state itself is
    grad_summary.final_state + exp(grad_summary.log_transition) * exit_state_grad.

    Returns:
        dq, dk, dv in the inputs' dtype; dlog_decay [B, T, H] float32, or None unless per token.
    """
    check_inputs(k, v, queries=q, output_grads=do, log_decay=log_decay, cu_seqlens=cu_seqlens)
    for item in (summary, grad_summary):
        _check_summary(item, k, v, cu_seqlens)
    for state in (entry_state, exit_state_grad):
        check_state(state, k, v, _num_sequences(k, cu_seqlens))
    with torch.no_grad():
        dq, dk, dv, dlog_decay, _ = dispatch.backward(
            (q, k, v, do),
            log_decay,
            cu_seqlens,
            entry_state,
            exit_state_grad,
            states=summary.local_states,
            grad_states=grad_summary.local_states,
            needs=dispatch.Needs(decay_grad=True, entry_grad=False),
        )
        return dq, dk, dv, dlog_decay


def lightning_step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, *, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Decode one or a few tokens from a state. Not differentiable.

    Args:
        q, k: [B, T, H, K]; v: [B, T, H, V]; T is 1 to a few, run in order.
        state: [B, H, K, V] float32, kept as it is.
        log_decay: None, [H] or [B, T, H], as for `lightning_attention`.

    Returns:
        o [B, T, H, V] in v's dtype and the new state [B, H, K, V] float32.
    """
    check_inputs(k, v, queries=q, log_decay=log_decay, cu_seqlens=None)
    check_state(state, k, v, k.shape[0])
    with torch.no_grad():
        return dispatch.step(q, k, v, state, log_decay)


def _num_sequences(k: Tensor, cu_seqlens: Tensor | None) -> int:
    return k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def _check_summary(summary: Summary, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> None:
    try:
        check_state(summary.final_state, k, v, _num_sequences(k, cu_seqlens))
    except KernelInputError as error:
        raise KernelInputError(f"the summary is not of these inputs: {error}") from None


def _log_transition(k: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """[S, H]: the sum of log decays over each sequence."""
    batch, tokens, heads, _ = k.shape
    dtype = state_dtype(k.dtype)
    if log_decay is None:
        return k.new_zeros(_num_sequences(k, cu_seqlens), heads, dtype=dtype)
    log_decay = log_decay.detach().to(dtype)
    if cu_seqlens is None:
        if log_decay.ndim == 1:
            return (log_decay * tokens).expand(batch, heads).clone()
        return log_decay.sum(1)
    lengths = cu_seqlens.diff().to(log_decay.device)
    if log_decay.ndim == 1:
        return lengths[:, None] * log_decay
    sequence = torch.arange(len(lengths), device=log_decay.device).repeat_interleave(
        lengths.long(), output_size=tokens
    )
    return log_decay.new_zeros(len(lengths), heads).index_add_(0, sequence, log_decay[0])
