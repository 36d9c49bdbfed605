"""Lightning attention as callers see it: one differentiable function, and the pieces it is made of.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences (B, or packed documents).

The pieces let a caller put communication between them: the summary of the local keys and values
can leave for other ranks before any output exists, and the outputs follow once the entry state is
known. `lightning_attention` is the pieces put together for one device.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.errors import KernelInputError
from seqpar.kernels.lightning import dispatch
from seqpar.kernels.lightning.dispatch import LocalStates
from seqpar.kernels.lightning.inputs import LOWEST_LOG_DECAY, state_dtype
from seqpar.kernels.lightning.plan import Plan, plan_of
from seqpar.kernels.tensors import check_like

__all__ = [
    "Summary",
    "attend",
    "attend_backward",
    "key_value_summary",
    "lightning_attention",
    "lightning_step",
    "query_grad",
    "query_grad_summary",
]


@dataclass(frozen=True, eq=False)
class Summary:
    """What local tokens do to a state that passes through them: it is decayed and added to.

    state that leaves = exp(log_transition) * state that enters + final_state. Read backward in
    time for `query_grad_summary`: gradient that reaches the entry = exp(log_transition) *
    gradient of the exit state + final_state.
    """

    final_state: Tensor
    """[S, H, K, V] float32: the result for zero in."""
    plan: Plan = field(repr=False)
    """What calls of these shapes share; private to the kernels."""
    log_decay: Tensor | None = field(default=None, repr=False)
    local_states: LocalStates | None = field(default=None, repr=False)
    """What `attend` and `attend_backward` can use again; private to the kernels."""
    reverse: bool = False
    """Whether it is of queries and gradients of outputs, backward in time."""

    @cached_property
    def log_transition(self) -> Tensor:
        """[S, H] float32: the total log decay, <= 0; made when it is first asked for."""
        per_token = self.log_decay is not None and self.log_decay.ndim == 3
        with torch.no_grad():
            if per_token and self.local_states is not None:
                return dispatch.log_transition(self.plan, self.local_states)
            return _log_transition(self.plan, self.log_decay)


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
            constant) or [B, T, H] float32 (per token). Values under -100 act as -100; over 0 they
            are refused on the CPU, and not looked at on a CUDA device.
        cu_seqlens: int32 [S + 1], bounds of documents packed into one row (B = 1), from 0 to T.
            On a CUDA device, pass it on the CPU to spare a synchronisation.
        initial_state: [S, H, K, V] float32, the state before each sequence's first token.
        return_final_state: also return the state after each sequence's last token.

    Returns:
        o [B, T, H, V] in v's dtype, and the final state [S, H, K, V] float32 or None.

    Raises:
        KernelInputError: shapes, dtypes, devices or bounds that do not fit, before any launch.
            Documents of no token are left out of cu_seqlens.

    Source: Qin et al., arXiv 2405.17381 (eq. 8 to 13); Dao and Gu, arXiv 2405.21060, for decay
    per token.
    """
    plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=cu_seqlens)
    plan.check_state("initial_state", initial_state)
    tensors = (q, k, v, log_decay, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return _LightningAttention.apply(  # type: ignore[no-any-return, no-untyped-call]
            *tensors, plan, cu_seqlens, return_final_state
        )
    o, final_state, _ = dispatch.forward(
        plan, q, k, v, log_decay, cu_seqlens, initial_state, return_final_state
    )
    return o, final_state


class _LightningAttention(torch.autograd.Function):
    """
    |          | in                                   | out                                   |
    | forward  | q, k, v, log_decay, initial_state    | o, final_state                        |
    | backward | do, dfinal_state                     | dq, dk, dv, dlog_decay, dinitial      |

    Saves its inputs and the states of segments.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        initial_state: Tensor | None,
        plan: Plan,
        cu_seqlens: Tensor | None,
        return_final_state: bool,
    ) -> tuple[Tensor, Tensor | None]:
        o, final_state, states = dispatch.forward(
            plan, q, k, v, log_decay, cu_seqlens, initial_state, return_final_state
        )
        ctx.save_for_backward(q, k, v, log_decay, initial_state)
        ctx.call = (plan, cu_seqlens, states)
        ctx.set_materialize_grads(False)
        return o, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None) -> tuple[Any, ...]:
        q, k, v, log_decay, initial_state = ctx.saved_tensors
        plan, cu_seqlens, states = ctx.call
        needs = ctx.needs_input_grad
        dq, dk, dv, dlog_decay, dinitial = dispatch.backward(
            plan,
            (q, k, v, torch.zeros_like(v) if do is None else do),
            log_decay,
            cu_seqlens,
            initial_state,
            dfinal,
            states=states,
            grad_states=None,
            decay_grad=needs[3],
            entry_grad=needs[4],
        )
        dlog_decay = _as_input(dlog_decay, log_decay)
        return dq, dk, dv, dlog_decay, _as_input(dinitial, initial_state), None, None, None


def _as_input(grad: Tensor | None, given: Tensor | None) -> Tensor | None:
    """A gradient in the dtype of what was given; None where nothing was."""
    return None if grad is None or given is None else grad.to(given.dtype)


def key_value_summary(
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    leaving: bool = True,
) -> Summary:
    """What the local keys and values do to a passing state, without any output.

    Args: as for `lightning_attention`; without `leaving`, `final_state` may be anything, and only
    what `attend` needs is sure to be computed. Not differentiable by autograd: `attend_backward` is
    the backward of `attend` and this together.
    """
    plan = plan_of(k, v, log_decay=log_decay, cu_seqlens=cu_seqlens)
    with torch.no_grad():
        state, local = dispatch.summary(
            plan, k, v, log_decay, cu_seqlens, reverse=False, leaving=leaving
        )
    return Summary(state, plan, log_decay, local)


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
    plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=cu_seqlens)
    _check_summary("summary", summary, plan)
    plan.check_state("entry_state", entry_state)
    with torch.no_grad():
        return dispatch.attend(
            plan, q, k, v, log_decay, cu_seqlens, entry_state, summary.local_states
        )


def query_grad_summary(
    q: Tensor,
    do: Tensor,
    *,
    log_decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    leaving: bool = True,
) -> Summary:
    """The gradient of the entry state that comes from local outputs alone, and its transition.

    Args: q [B, T, H, K] and do [B, T, H, V]; the rest as for `key_value_summary`, with
    `attend_backward` in place of `attend`.
    """
    plan = plan_of(q, do, names=("q", "do"), log_decay=log_decay, cu_seqlens=cu_seqlens)
    with torch.no_grad():
        grad, local = dispatch.summary(
            plan, q, do, log_decay, cu_seqlens, reverse=True, leaving=leaving
        )
    return Summary(grad, plan, log_decay, local, reverse=True)


def query_grad(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    summary: Summary,
    *,
    log_decay: Tensor | None = None,
    entry_state: Tensor | None = None,
) -> Tensor | None:
    """The gradient of q, which needs no gradients of states, ahead of `attend_backward`.

    Args: those of `attend_backward`; whole rows, and no decay per token.

    Returns:
        What `attend_backward` takes as `query_grad`; None where it comes with the rest at no less.
    """
    plan = plan_of(k, v, queries=q, output_grads=do, log_decay=log_decay, cu_seqlens=None)
    _check_summary("summary", summary, plan)
    plan.check_state("entry_state", entry_state)
    with torch.no_grad():
        return dispatch.query_grad(plan, (q, k, v, do), entry_state, summary.local_states)


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
    query_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of the local q, k, v and per-token log_decay.

    Args: as for `lightning_attention`, with do [B, T, H, V], the summaries of (k, v) and (q, do),
    the states that enter, and the gradients of the states that leave, [S, H, K, V] float32 each
    (None: zero), and what the function `query_grad` gave, if it was called. The gradient of the
    entry state itself is
    grad_summary.final_state + exp(grad_summary.log_transition) * exit_state_grad.

    Returns:
        dq, dk, dv in the inputs' dtype; dlog_decay [B, T, H] float32, or None unless per token.
    """
    plan = plan_of(k, v, queries=q, output_grads=do, log_decay=log_decay, cu_seqlens=cu_seqlens)
    _check_summary("summary", summary, plan)
    _check_summary("grad_summary", grad_summary, plan, reverse=True)
    plan.check_state("entry_state", entry_state)
    plan.check_state("exit_state_grad", exit_state_grad)
    if query_grad is not None:
        shape = (*plan.problem[:3], plan.key_dim)
        check_like("query_grad", query_grad, shape, plan.problem.dtype, plan.problem.device)
    with torch.no_grad():
        dq, dk, dv, dlog_decay, _ = dispatch.backward(
            plan,
            (q, k, v, do),
            log_decay,
            cu_seqlens,
            entry_state,
            exit_state_grad,
            states=summary.local_states,
            grad_states=grad_summary.local_states,
            decay_grad=True,
            entry_grad=False,
            query_grad=query_grad,
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
    plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=None)
    if state is None:
        raise KernelInputError("state is None; pass [B, H, K, V] float32, zeros to begin with")
    plan.check_state("state", state)
    with torch.no_grad():
        return dispatch.step(plan, q, k, v, state, log_decay)


def _check_summary(name: str, summary: Summary, plan: Plan, *, reverse: bool = False) -> None:
    """Its states of segments are of its own tokens and cut: others would read past their end."""
    maker = "query_grad_summary" if reverse else "key_value_summary"
    if not isinstance(summary, Summary) or summary.reverse != reverse:
        raise KernelInputError(f"{name} must be what {maker} gave for these inputs")
    made_of, wanted = summary.plan.problem, plan.problem
    if summary.plan is plan or made_of == wanted:
        return
    field_name = next(n for n in wanted._fields if getattr(made_of, n) != getattr(wanted, n))
    raise KernelInputError(
        f"{name} is not of these inputs: its {field_name} is {getattr(made_of, field_name)}, "
        f"theirs is {getattr(wanted, field_name)}; make it from the same tensors and cu_seqlens"
    )


def _log_transition(plan: Plan, log_decay: Tensor | None) -> Tensor:
    """[S, H]: the sum of log decays over each sequence."""
    dtype = state_dtype(plan.problem.dtype)
    if log_decay is None:
        shape = (plan.num_sequences, plan.problem.heads)
        return torch.zeros(shape, dtype=dtype, device=plan.problem.device)
    log_decay = log_decay.detach().to(dtype)
    if log_decay.ndim == 1:
        return plan.lengths[:, None] * log_decay.clamp(min=LOWEST_LOG_DECAY)
    if plan.problem.bounds is None:
        return log_decay.sum(1)
    sums = log_decay.new_zeros(plan.num_sequences, plan.problem.heads)
    return sums.index_add_(0, plan.sequence_of_token, log_decay[0])
