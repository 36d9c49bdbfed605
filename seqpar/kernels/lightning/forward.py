"""Forward on Triton: at most three launches, none of which leaves a tensor as long as the input.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences, M segments.

    1. segment_states   what each segment adds to a passing state        reads k, v (where needed)
    2. enter_segments   what enters each of many segments                [M, H, K, V]
    3. output_pass      the outputs                                      reads q, k, v, writes o

Up to 16 segments a sequence, the third sums what comes before; with as many sequences and heads
as multiprocessors nothing is cut and only the third remains.

Floor: q, k and v read once and o written once, 4 tensors. The state pass adds what it reads of k
and v: nothing if nothing is cut, little under lightning's decays, up to half of the floor without
decay. docs/lightning.md has the shares that were measured.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.kernels.lightning.decays import Decays, prepare_decays
from seqpar.kernels.lightning.launch_output import Entering, Waits, output_pass
from seqpar.kernels.lightning.plan import Cut, Plan
from seqpar.kernels.lightning.state_pass import enter_segments, segment_states

__all__ = ["SegmentStates", "attend_triton", "forward_triton", "summarize", "summary_triton"]

_MOST_IN_LINE = 16
"""Segments of a sequence up to which each program sums what comes before its own."""


class SegmentStates(NamedTuple):
    """What the segments of one call add to a passing state."""

    cut: Cut
    decays: Decays
    states: Tensor | None
    """[M, H, K, V] float32, or None if no sequence is cut."""

    @property
    def in_line(self) -> bool:
        """Whether each program of an output pass sums up what enters its segment by itself."""
        return self.states is None or self.cut.segments.deepest <= _MOST_IN_LINE

    def into(self, initial: Tensor | None, *, reverse: bool) -> Entering:
        """What an output pass begins with, for `initial` into each sequence."""
        if self.states is None or self.in_line:
            return Entering(self.states, initial)
        entries = torch.empty_like(self.states)
        enter_segments(
            self.states, self.decays, self.cut, initial=initial, entries=entries, reverse=reverse
        )
        return Entering(entries, None, scanned=True)


def summarize(
    plan: Plan,
    y: Tensor,
    z: Tensor,
    log_decay: Tensor | None,
    *,
    reverse: bool,
    final: bool,
    decays: Decays | None = None,
    room: Tensor | None = None,
    beside: bool = False,
) -> tuple[SegmentStates, Tensor | None]:
    """What the segments add, and what leaves the sequences for zero in if `final`.

    `decays` are those of the plan's cut, if a pass has had them already; `room` and
    `beside` as for `segment_states`.
    """
    cut = plan.cut
    if decays is None:
        decays = prepare_decays(plan.decay(log_decay), cut, plan.config.chunk)
    is_cut = cut.segments.num_cut > 0
    if not is_cut and not final:
        return SegmentStates(cut, decays, None), None
    states = segment_states(
        y, z, decays, cut, plan.state_config, reverse=reverse, every=final, room=room, beside=beside
    )
    if not is_cut:
        return SegmentStates(cut, decays, None), states
    leaving = None
    if final:
        leaving = plan.new_state()
        enter_segments(states, decays, cut, final=leaving, reverse=reverse)
    return SegmentStates(cut, decays, states), leaving


def summary_triton(
    plan: Plan,
    y: Tensor,
    z: Tensor,
    log_decay: Tensor | None,
    *,
    reverse: bool,
    leaving: bool = True,
) -> tuple[Tensor, SegmentStates]:
    """What leaves each sequence for zero in: [S, H, K, V], of (k, v), or of (q, do) reversed.

    Unless `leaving`, that is memory as it was found.
    """
    y, z = plan.aligned(y), plan.aligned(z)
    states, final = summarize(plan, y, z, log_decay, reverse=reverse, final=leaving)
    if final is None:
        final = plan.new_state()
    return plan.trimmed(final, plan.problem.key_dim, plan.problem.value_dim), states


def forward_triton(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    initial: Tensor | None,
    *,
    return_final: bool,
) -> tuple[Tensor, Tensor | None, SegmentStates]:
    """o [B, T, H, V], the exit states [S, H, K, V] if asked for, and what backward uses again."""
    q, k, v = plan.aligned(q), plan.aligned(k), plan.aligned(v)
    states, _ = summarize(plan, k, v, log_decay, reverse=False, final=False)
    o, final = _outputs(plan, q, k, v, states, plan.state(initial), return_final, just_made=True)
    return o, final, states


def attend_triton(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: SegmentStates,
    entry_state: Tensor | None,
) -> Tensor:
    """Outputs [B, T, H, V] from the states of `summary_triton`."""
    q, k, v = plan.aligned(q), plan.aligned(k), plan.aligned(v)
    return _outputs(plan, q, k, v, states, plan.state(entry_state), False)[0]


def _outputs(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    states: SegmentStates,
    entry_state: Tensor | None,
    return_final: bool,
    *,
    just_made: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """o and the exit states; `just_made`: no other launch of ours came after the states'."""
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    final = plan.new_state() if return_final else None
    entering = states.into(entry_state, reverse=False)
    after_states = just_made and states.states is not None and states.in_line
    waits: Waits = "for states" if after_states else "first"
    output_pass(
        (q, k, v),
        o,
        states.decays,
        states.cut,
        plan.config,
        entering,
        final=final,
        reverse=False,
        transposed=False,
        waits=waits,
    )
    if final is not None:
        final = plan.trimmed(final, plan.problem.key_dim, plan.problem.value_dim)
    return plan.trimmed(o, plan.problem.value_dim), final
