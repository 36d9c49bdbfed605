"""Which path runs: Triton on CUDA devices, the PyTorch loop on CPU and for float64.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences.

The Triton modules are imported only where they run. Every function takes the call's plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from torch import Tensor

from seqpar.kernels.as_given import as_given
from seqpar.kernels.lightning import chunked
from seqpar.kernels.lightning.plan import Plan
from seqpar.kernels.on_device import on_device

if TYPE_CHECKING:
    from seqpar.kernels.lightning.forward import SegmentStates

    LocalStates: TypeAlias = SegmentStates
else:
    LocalStates = object

__all__ = ["LocalStates", "attend", "backward", "forward", "log_transition", "step", "summary"]


def forward(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    return_final: bool,
) -> tuple[Tensor, Tensor | None, LocalStates | None]:
    """o, the final state if asked for, and what backward can use again."""
    if plan.on_triton:
        from seqpar.kernels.lightning.forward import forward_triton

        with on_device(plan.problem.device):
            return forward_triton(
                plan, q, k, v, log_decay, initial_state, return_final=return_final
            )
    with as_given(q.device):
        o, final = chunked.attend_chunked(
            q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens, entry_state=initial_state
        )
    return o, final if return_final else None, None


def summary(
    plan: Plan,
    y: Tensor,
    z: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
    leaving: bool,
) -> tuple[Tensor, LocalStates | None]:
    """What leaves each sequence for zero in: [S, H, K, V], of (k, v), or of (q, do) reversed.

    Unless `leaving`, that may be anything.
    """
    if plan.on_triton:
        from seqpar.kernels.lightning.forward import summary_triton

        with on_device(plan.problem.device):
            return summary_triton(plan, y, z, log_decay, reverse=reverse, leaving=leaving)
    state_of = chunked.query_grad_state_chunked if reverse else chunked.key_value_state_chunked
    with as_given(y.device):
        return state_of(y, z, log_decay=log_decay, cu_seqlens=cu_seqlens), None


def log_transition(plan: Plan, states: LocalStates) -> Tensor:
    """[S, H] float32: the total log decay of each sequence, where decays are per token."""
    from seqpar.kernels.lightning.decays import sequence_decays

    with on_device(plan.problem.device):
        return sequence_decays(states.decays, states.cut)


def attend(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    entry_state: Tensor | None,
    states: LocalStates | None,
) -> Tensor:
    """Outputs from entry states, with the segments' states of `summary` if it ran on Triton."""
    if plan.on_triton and states is not None:
        from seqpar.kernels.lightning.forward import attend_triton

        with on_device(plan.problem.device):
            return attend_triton(plan, q, k, v, states, entry_state)
    with as_given(q.device):
        return chunked.attend_chunked(
            q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens, entry_state=entry_state
        )[0]


def query_grad(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    entry_state: Tensor | None,
    states: LocalStates | None,
) -> Tensor | None:
    """dq ahead of `backward`; None unless it is a launch of its own, whose states are there."""
    if plan.on_triton and states is not None:
        from seqpar.kernels.lightning.backward import query_grad_triton

        with on_device(plan.problem.device):
            return query_grad_triton(plan, inputs, entry_state, states)
    return None


def backward(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    entry_state: Tensor | None,
    exit_state_grad: Tensor | None,
    *,
    states: LocalStates | None,
    grad_states: LocalStates | None,
    decay_grad: bool,
    entry_grad: bool,
    query_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dlog_decay [B, T, H] (per-token decay only), dentry [S, H, K, V].

    `inputs` are q, k, v, do. The last two come if they are asked for, or if they cost nothing.
    """
    if plan.on_triton:
        from seqpar.kernels.lightning.backward import backward_triton

        with on_device(plan.problem.device):
            return backward_triton(
                plan,
                inputs,
                log_decay,
                entry_state,
                exit_state_grad,
                states=states,
                grad_states=grad_states,
                decay_grad=decay_grad,
                entry_grad=entry_grad,
                query_grad=query_grad,
            )
    with as_given(inputs[0].device):
        return chunked.attend_backward_chunked(
            *inputs,
            log_decay=log_decay,
            cu_seqlens=cu_seqlens,
            entry_state=entry_state,
            exit_state_grad=exit_state_grad,
        )


def step(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A few recurrent steps from a state that is kept as it is."""
    if plan.on_triton:
        from seqpar.kernels.lightning.step import step_triton

        with on_device(plan.problem.device):
            return step_triton(plan, q, k, v, state, log_decay)
    with as_given(q.device):
        return chunked.step_recurrent(q, k, v, state, log_decay)
