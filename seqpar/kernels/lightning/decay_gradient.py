# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Backward with the gradient of decays per token.

Legend: N rows of all sequences, M segments, S sequences, H heads, K key dim, V value dim.

With G the running sum of log decays, and a sequence's exit state S_T with gradient E,

    dL/dG_i = q_i . dq_i - k_i . dk_i,     dL/dg_t = <S_T, E> + sum_(i >= t) dL/dG_i

(Dao and Gu, arXiv 2405.21060, appendix; k_i . dk_i = v_i . dv_i.) Summed over a long sequence,
rounding errors of pairs that do not cross t would drown the rest. So a token's sum ends with its
segment, of at most 2048 tokens, where <state, gradient of the state> is known from the states
themselves; and within a chunk the passes take row sums minus column sums of the same numbers.

Floor of it all: q, k, v, do read once, dq, dk, dv written once, 7 tensors (1.77 ms at
(4, 32768, 32, 128) on an H200); it moves 18 and takes 6.0 ms.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning.decays import Decays, prepare_decays
from seqpar.kernels.lightning.launch_output import empty_parts, output_pass
from seqpar.kernels.lightning.plan import Cut, Plan
from seqpar.kernels.lightning.state_pass import enter_segments, segment_states
from seqpar.kernels.lightning.tuning import with_gradient

__all__ = ["backward_with_decay"]


@triton.jit
def _inner_product(p_a, p_b, KV, BLOCK: tl.constexpr):
    """<a, b> of two states."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    for i in range(0, KV, BLOCK):
        o_kv = i + tl.arange(0, BLOCK)
        b_a = tl.load(p_a + o_kv, mask=o_kv < KV, other=0.0)
        b_sum += b_a * tl.load(p_b + o_kv, mask=o_kv < KV, other=0.0)
    return tl.sum(b_sum, 0)


@triton.jit
def crossing_kernel(
    p_entries, p_grads, p_final, p_exit_grad, p_out, p_sequence, p_first, H, KV,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[m, h] = <S, E> with S the state that leaves segment m, and E its gradient. Grid: (M, H).

    What leaves enters the next segment, or is the sequence's exit state; 0 without a gradient.
    """
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    i_s = tl.load(p_sequence + i_m)
    o_state = (i_m * H + i_h).to(tl.int64) * KV
    crossing = 0.0
    if i_m + 1 < tl.load(p_first + i_s + 1):
        o_next = ((i_m + 1) * H + i_h).to(tl.int64) * KV
        crossing = _inner_product(p_entries + o_next, p_grads + o_state, KV, BLOCK)
    elif p_final is not None:
        o_sequence = (i_s * H + i_h).to(tl.int64) * KV
        crossing = _inner_product(p_final + o_sequence, p_exit_grad + o_sequence, KV, BLOCK)
    tl.store(p_out + i_m * H + i_h, crossing)


@triton.jit(do_not_specialize=["N"])  # the number of rows: new with every batch
def decay_gradient_kernel(
    p_from_q, p_from_v, p_crossing, p_out, p_bounds, H, N, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t, h] = crossing[m, h] + the sum, from t to its segment's end, of from_q - from_v.

    `from_v` comes in parts to be summed. Grid: (M, H). BLOCK holds a segment.
    """
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    o_row = start + tl.arange(0, BLOCK)
    m_row = o_row < stop
    b_dreach = tl.load(p_from_q + i_h.to(tl.int64) * N + o_row, mask=m_row, other=0.0)
    for i in tl.static_range(PARTS):
        p_part = p_from_v + (i * H + i_h).to(tl.int64) * N
        b_dreach -= tl.load(p_part + o_row, mask=m_row, other=0.0)
    b_out = tl.load(p_crossing + i_m * H + i_h) + tl.cumsum(b_dreach, 0, reverse=True)
    tl.store(p_out + o_row.to(tl.int64) * H + i_h, b_out, mask=m_row)


def backward_with_decay(
    plan: Plan,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    log_decay: Tensor,
    entry_state: Tensor | None,
    exit_state_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_decay [B, T, H] float32 and the gradient of the entry states."""
    q, k, v, do = inputs
    cut, config = plan.fine_cut, plan.config
    decays = prepare_decays(log_decay, cut, config.chunk)
    final = None if exit_state_grad is None else plan.new_state()
    states = segment_states(k, v, decays, cut, config, reverse=False, every=final is not None)
    enter_segments(
        states, decays, cut, initial=entry_state, entries=states, final=final, reverse=False
    )
    dq, from_q = _pass_with_gradient(plan, decays, (do, v, k), q, states, reverse=False)
    from_q = from_q.sum(0)  # makes room before the other states are made
    grads = segment_states(q, do, decays, cut, config, reverse=True, every=False)
    enter_segments(grads, decays, cut, initial=exit_state_grad, entries=grads, reverse=True)
    crossing = _crossing(cut, states, grads, final, exit_state_grad)
    del states
    entry_grad, dk = plan.new_state(), torch.empty_like(k, memory_format=torch.contiguous_format)
    dv, from_v = _pass_with_gradient(
        plan, decays, (k, q, do), v, grads, final=entry_grad, reverse=True
    )
    output_pass(
        (v, do, q), dk, decays, cut, plan.transposed_config,
        states=grads, scanned=True, reverse=True, transposed=True,
    )  # fmt: skip
    out = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch = cut.launches.get("decay gradient")
    if launch is None:
        launch = cut.launches["decay gradient"] = _gradient_launch(cut, from_v)
    launch(from_q, from_v, crossing, out)
    return dq, dk, dv, out, entry_grad


def _crossing(
    cut: Cut,
    entries: Tensor,
    grads: Tensor,
    final: Tensor | None,
    exit_state_grad: Tensor | None,
) -> Tensor:
    """[M, H]: <state that leaves a segment, its gradient>."""
    _, heads, key_dim, value_dim = entries.shape
    out = torch.empty(entries.shape[:2], dtype=torch.float32, device=entries.device)
    ends = () if final is None or exit_state_grad is None else (final, exit_state_grad)
    key = ("crossing", len(ends))
    launch = cut.launches.get(key)
    if launch is None:
        fixed: dict[str, Any] = {
            "p_sequence": cut.segments.sequence, "p_first": cut.segments.first,
            "H": heads, "KV": key_dim * value_dim, "BLOCK": 1024,
        }  # fmt: skip
        if not ends:
            fixed |= {"p_final": None, "p_exit_grad": None}
        launch = Launch(crossing_kernel, (cut.segments.count, heads), fixed=fixed)
        cut.launches[key] = launch
    launch(entries, grads, *ends, out)
    return out


def _gradient_launch(cut: Cut, from_v: Tensor) -> Launch:
    parts, heads, rows = from_v.shape
    fixed: dict[str, Any] = {
        "p_bounds": cut.segments.bounds, "H": heads, "N": rows, "PARTS": parts,
        "BLOCK": max(16, triton.next_power_of_2(cut.segments.longest)),
    }  # fmt: skip
    return Launch(decay_gradient_kernel, (cut.segments.count, heads), fixed=fixed)


def _pass_with_gradient(
    plan: Plan,
    decays: Decays,
    roles: tuple[Tensor, Tensor, Tensor],
    of: Tensor,
    states: Tensor,
    *,
    final: Tensor | None = None,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """The gradient of `of`, q or in reverse v, and parts of the gradient of G to be summed."""
    config = with_gradient(plan.config if reverse else plan.transposed_config)
    out = torch.empty_like(of, memory_format=torch.contiguous_format)
    dreach = empty_parts(out, out.shape[3], config, reverse=reverse)
    output_pass(
        roles, out, decays, plan.fine_cut, config, states=states, scanned=True, final=final,
        reverse=reverse, transposed=not reverse, of=of, dreach=dreach,
    )  # fmt: skip
    return out, dreach
