# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Backward with the gradient of decays per token.

Legend: N rows of all sequences, M segments, S sequences, H heads, K key dim, V value dim.

With G the running sum of log decays, and a sequence's exit state S_T with gradient E,

    dL/dG_i = q_i . dq_i - k_i . dk_i,     dL/dg_t = <S_T, E> + sum_(i >= t) dL/dG_i

(Dao and Gu, arXiv 2405.21060, appendix; k_i . dk_i = v_i . dv_i.) Summed over a long sequence,
rounding errors of pairs that do not cross t would drown the rest. So a token's sum ends with its
segment, of at most 2048 tokens, where <state, gradient of the state> is known from the states
themselves; and within a chunk the passes take row sums minus column sums of the same numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.lightning.backward import empty_entry_grad
from seqpar.kernels.lightning.decays import prepare_decays
from seqpar.kernels.lightning.forward import Prepared, SegmentStates, segments_of
from seqpar.kernels.lightning.launch_output import output_pass
from seqpar.kernels.lightning.state_pass import enter_segments, segment_states
from seqpar.kernels.lightning.tuning import configuration, with_gradient

__all__ = ["backward_with_decay"]


@triton.jit
def decay_gradient_kernel(
    p_from_q, p_from_v, p_crossing, p_out, p_bounds, H, N, tiles_q, tiles_v, BLOCK: tl.constexpr
):
    """out[t, h] = crossing[m, h] + the sum, from t to its segment's end, of from_q - from_v.

    Grid: (M, H). BLOCK holds a segment.
    """
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    o_row = start + tl.arange(0, BLOCK)
    m_row = o_row < stop
    b_dreach = tl.zeros([BLOCK], tl.float32)
    for i in range(0, tiles_q):
        b_dreach += tl.load(
            p_from_q + (i * H + i_h).to(tl.int64) * N + o_row, mask=m_row, other=0.0
        )
    for i in range(0, tiles_v):
        b_dreach -= tl.load(
            p_from_v + (i * H + i_h).to(tl.int64) * N + o_row, mask=m_row, other=0.0
        )
    b_out = tl.load(p_crossing + i_m * H + i_h) + tl.cumsum(b_dreach, 0, reverse=True)
    tl.store(p_out + o_row.to(tl.int64) * H + i_h, b_out, mask=m_row)


def backward_with_decay(
    prepared: Prepared, entry_state: Tensor | None, exit_state_grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_decay [B, T, H] float32 and the gradient of the entry states."""
    q, k, v, do = prepared.tensors
    config = configuration(k.shape[3], v.shape[3], k.dtype)
    segments = segments_of(prepared, config, v.shape[3], fine=True)
    decays = prepare_decays(prepared.log_decay, segments, config.chunk)

    def entered(
        y: Tensor, z: Tensor, initial: Tensor | None, *, reverse: bool, return_final: bool
    ) -> tuple[SegmentStates, Tensor | None]:
        """What enters the segments, from outside the sequences included."""
        states = segment_states(y, z, decays, segments, config, reverse=reverse, every=return_final)
        entries, final = enter_segments(
            states, decays, segments, initial=initial,
            reverse=reverse, return_final=return_final, in_place=True,
        )  # fmt: skip
        return SegmentStates(segments, decays, entries), final

    with_final = exit_state_grad is not None
    states, final = entered(k, v, entry_state, reverse=False, return_final=with_final)
    grad_states, _ = entered(q, do, exit_state_grad, reverse=True, return_final=False)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    entry_grad = empty_entry_grad(prepared)
    from_q = _role((do, v, k), dq, q, states, None, reverse=False, transposed=True)
    from_v = _role((k, q, do), dv, v, grad_states, entry_grad, reverse=True, transposed=False)
    output_pass(
        (v, do, q),
        dk,
        grad_states.decays,
        segments,
        configuration(v.shape[3], q.shape[3], q.dtype),
        states=grad_states.states,
        scanned=True,
        reverse=True,
        transposed=True,
    )
    crossing = _crossing(states, grad_states, final, exit_state_grad)
    out = q.new_empty(q.shape[:3], dtype=torch.float32)
    heads, rows = q.shape[2], q.shape[0] * q.shape[1]
    decay_gradient_kernel[(segments.count, heads)](
        from_q,
        from_v,
        crossing,
        out,
        segments.bounds,
        heads,
        rows,
        from_q.shape[0],
        from_v.shape[0],
        BLOCK=max(16, triton.next_power_of_2(segments.longest)),
    )
    return dq, dk, dv, out, entry_grad


def _role(
    roles: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    of: Tensor,
    states: SegmentStates,
    final: Tensor | None,
    *,
    reverse: bool,
    transposed: bool,
) -> Tensor:
    """Run one output pass that also gives the gradient of G: [tiles, H, N] float32."""
    x, _, z = roles
    config = with_gradient(configuration(x.shape[3], z.shape[3], x.dtype))
    tiles = triton.cdiv(z.shape[3], config.value_tile)
    dreach = x.new_empty(tiles, x.shape[2], x.shape[0] * x.shape[1], dtype=torch.float32)
    output_pass(
        roles,
        out,
        states.decays,
        states.segments,
        config,
        states=states.states,
        scanned=True,
        final=final,
        reverse=reverse,
        transposed=transposed,
        of=of,
        dreach=dreach,
    )
    return dreach


def _crossing(
    states: SegmentStates,
    grad_states: SegmentStates,
    final: Tensor | None,
    exit_state_grad: Tensor | None,
) -> Tensor:
    """[M, H]: <state that leaves segment m, its gradient>; 0 where no gradient comes back."""
    segments = states.segments
    entries, grads = states.states, grad_states.states
    assert entries is not None
    assert grads is not None
    crossing = entries.new_zeros(entries.shape[:2])
    if len(crossing) > 1:
        inner = torch.linalg.vecdot(entries[1:].flatten(2), grads[:-1].flatten(2))
        same = segments.sequence[1:] == segments.sequence[:-1]
        crossing[:-1] = torch.where(same[:, None], inner, 0.0)
    if final is not None and exit_state_grad is not None:
        last = segments.first[1:].long() - 1
        crossing[last] = torch.linalg.vecdot(final.flatten(2), exit_state_grad.flatten(2))
    return crossing
