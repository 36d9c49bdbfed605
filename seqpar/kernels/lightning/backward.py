"""Backward on Triton: output passes with exchanged roles, and two passes for the states.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences, M segments.

    states of (k, v) forward in time    -> entries A          (kept from the forward pass)
    states of (q, do) backward in time  -> entries E
    dq = output_pass(do, v, k; A) forward
    dv = output_pass(k, q, do; E) backward
    dk = output_pass(v, do, q; E) backward

What does not need the launch before it runs beside that one's end (overlap.py): the states E beside
dq, dk beside dv, and all three where nothing is cut and no decay learns.

No state of a chunk is ever written to memory: each pass carries its own.

The gradient of decays per token comes from sums that the passes of dq and dk give besides
(decay_gradient.py). The pass of dk reads what that of dq wrote of them, and begins as soon as all
of dv's programs have begun: so these must have waited for dq by then, and dv is never beside it.

Floor: q, k, v and do read once, dq, dk and dv written once, 7 tensors. The three passes move 12,
so their share of the floor can not exceed 0.58. One launch of dk and dv that reads what they share
once moves 10, but took longer (docs/lightning.md, "What was tried").
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.kernels.lightning.decay_gradient import decay_gradient, learn
from seqpar.kernels.lightning.forward import SegmentStates, summarize
from seqpar.kernels.lightning.launch_output import (
    Entering,
    Learning,
    Waits,
    is_by_hand,
    output_pass,
)
from seqpar.kernels.lightning.plan import Plan
from seqpar.kernels.lightning.state_pass import room_for_states
from seqpar.kernels.lightning.tuning import with_gradient

__all__ = ["Gradients", "backward_triton", "query_grad_triton"]


class Gradients(NamedTuple):
    """What backward gives; `log_decay` [B, T, H] and `entry` [S, H, K, V] if asked for."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    entry: Tensor | None


def backward_triton(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    log_decay: Tensor | None,
    entry_state: Tensor | None,
    exit_state_grad: Tensor | None,
    *,
    states: SegmentStates | None,
    grad_states: SegmentStates | None,
    decay_grad: bool,
    entry_grad: bool,
    query_grad: Tensor | None = None,
) -> Gradients:
    """Gradients of q, k, v and what else is asked for.

    `inputs` are q, k, v, do; `states` are those of (k, v), `grad_states` those of (q, do). What the
    caller does not have is made, dq too (`query_grad`, padded), which decays that learn take along.
    """
    q, k, v, do = (plan.aligned(x) for x in inputs)
    entry_state, exit_state_grad = plan.state(entry_state), plan.state(exit_state_grad)
    if states is None:
        states, _ = summarize(plan, k, v, log_decay, reverse=False, final=False)
    cut, of_q, of_k = states.cut, None, None
    learns = decay_grad and plan.problem.decay_dims == 3
    if learns:
        config = plan.transposed_config
        of_q, of_k = learn(
            q, k, plan.value_dim, cut, config.value_tile,
            passed_on=cut.segments.num_cut > 0 or exit_state_grad is not None,
            by_hand=is_by_hand(config, k, v, q, do),
        )  # fmt: skip
    # Memory first: what runs beside another launch must not be given what that one still reads.
    dv, dk = _empty(v), _empty(k)
    room = room_for_states(q, do, cut) if grad_states is None and cut.segments.num_cut else None
    dentry = plan.new_state() if entry_grad else None
    waits: Waits = "first"
    dq = None if learns else query_grad
    follows = dq is None
    if dq is None:  # before the other states, so that the device starts early
        dq = query_grad_triton(plan, (q, k, v, do), entry_state, states, learning=of_q)
        waits = "first" if cut.segments.num_cut else "for states" if learns else "last"
    if grad_states is None:
        grad_states, _ = summarize(
            plan, q, do, log_decay, reverse=True, final=False, decays=states.decays,
            room=room, beside=follows,
        )  # fmt: skip
        waits = "for states" if cut.segments.num_cut and grad_states.in_line else waits
    behind = grad_states.into(exit_state_grad, reverse=True)
    _pass(
        plan, (k, q, do), dv, grad_states, behind,
        final=dentry, reverse=True, transposed=False, waits=waits,
    )  # fmt: skip
    assert not (learns and waits == "last"), "what dq's pass sums may not be there for dk's"
    _pass(
        plan, (v, do, q), dk, grad_states, behind,
        reverse=True, transposed=True, learning=of_k, waits="last",
    )  # fmt: skip
    dlog_decay = decay_gradient(of_q, of_k, cut) if of_q and of_k else None
    return _trimmed(plan, dq, dk, dv, dlog_decay, dentry)


def query_grad_triton(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    entry_state: Tensor | None,
    states: SegmentStates,
    *,
    learning: Learning | None = None,
) -> Tensor:
    """dq, padded where the plan pads, which needs nothing from backward in time."""
    q, k, v, do = (plan.aligned(x) for x in inputs)
    dq = _empty(q)
    before = states.into(plan.state(entry_state), reverse=False)
    _pass(plan, (do, v, k), dq, states, before, reverse=False, transposed=True, learning=learning)
    return dq


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _pass(
    plan: Plan,
    roles: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    states: SegmentStates,
    entering: Entering,
    *,
    final: Tensor | None = None,
    reverse: bool,
    transposed: bool,
    learning: Learning | None = None,
    waits: Waits = "first",
) -> None:
    """One output pass over the cut of `states`."""
    config = plan.transposed_config if transposed else plan.config
    output_pass(
        roles,
        out,
        states.decays,
        states.cut,
        config if learning is None else with_gradient(config),
        entering,
        final=final,
        reverse=reverse,
        transposed=transposed,
        learning=learning,
        waits=waits,
    )


def _trimmed(
    plan: Plan, dq: Tensor, dk: Tensor, dv: Tensor, decay: Tensor | None, entry: Tensor | None
) -> Gradients:
    if not plan.is_padded:
        return Gradients(dq, dk, dv, decay, entry)
    key_dim, value_dim = plan.problem.key_dim, plan.problem.value_dim
    if entry is not None:
        entry = plan.trimmed(entry, key_dim, value_dim)
    parts = (plan.trimmed(dq, key_dim), plan.trimmed(dk, key_dim), plan.trimmed(dv, value_dim))
    return Gradients(*parts, decay, entry)
