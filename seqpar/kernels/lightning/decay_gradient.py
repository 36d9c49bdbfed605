# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""The gradient of decays per token.

Legend: N rows of all sequences, M segments, H heads, K key dim, V value dim.

With G the running sum of log decays, and S the state that leaves a segment, E its gradient,

    dL/dG_i = q_i . dq_i - k_i . dk_i,     dL/dg_t = <S, E> + sum_(i >= t) dL/dG_i

over the tokens i of t's segment (Dao and Gu, arXiv 2405.21060, appendix). The passes that make dq
and dk give q . dq and k . dk before they are rounded, and <S, E>.

The sum keeps what crosses t and has to cancel the rest, tens of thousands of tokens of it. It does
because both passes work with the same numbers: pairs of one chunk are rounded alike in both; states
and what is added to them are multiplied as sums of two numbers, so that what one pass adds to a
state is, to 2^-16, what the other reads from it. Then errors do not add up along the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning.launch_output import Learning
from seqpar.kernels.lightning.plan import Cut

__all__ = ["decay_gradient", "learn"]


@triton.jit(do_not_specialize=["M", "N"])  # new with every batch
def decay_gradient_kernel(
    p_from_q, p_from_k, p_crossing, p_out, p_bounds, M, H, N,
    TILES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t, h] = crossing[m, h] + the sum, from t to its segment's end, of from_q - from_k.

    All three come in parts, one for each tile of K, to be summed. Grid: (M, H).
    """
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    behind = 0.0
    if p_crossing is not None:
        for i_k in tl.static_range(TILES):
            behind += tl.load(p_crossing + (i_k * M + i_m) * H + i_h)
    for i in range(0, tl.cdiv(stop - start, BLOCK)):
        o_row = stop - (i + 1) * BLOCK + tl.arange(0, BLOCK)
        m_row = o_row >= start
        b_dreach = tl.zeros([BLOCK], tl.float32)
        for i_k in tl.static_range(TILES):
            o_part = (i_k * H + i_h).to(tl.int64) * N + o_row
            b_dreach += tl.load(p_from_q + o_part, mask=m_row, other=0.0)
            b_dreach -= tl.load(p_from_k + o_part, mask=m_row, other=0.0)
        b_out = behind + tl.cumsum(b_dreach, 0, reverse=True)
        tl.store(p_out + o_row.to(tl.int64) * H + i_h, b_out, mask=m_row)
        behind += tl.sum(b_dreach, 0)


def learn(
    q: Tensor, k: Tensor, value_dim: int, cut: Cut, parts: int, *, exits: bool
) -> tuple[Learning, Learning]:
    """What the passes that make dq and dk are to write; `exits`: whether any state is passed on."""
    batch, tokens, heads, key_dim = q.shape
    count = cut.segments.count

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    leaving = empty(count, heads, key_dim, value_dim) if exits else None
    crossing = empty(parts, count, heads) if exits else None
    return (
        Learning(q, empty(parts, heads, batch * tokens), leaving),
        Learning(k, empty(parts, heads, batch * tokens), leaving, crossing),
    )


def decay_gradient(of_q: Learning, of_k: Learning, cut: Cut) -> Tensor:
    """[B, T, H] float32: the gradient of decays per token, after both passes."""
    batch, tokens, heads, _ = of_q.of.shape
    out = torch.empty(batch, tokens, heads, dtype=torch.float32, device=of_q.of.device)
    key = ("decay gradient", of_k.crossing is None)
    launch = cut.launches.get(key)
    if launch is None:
        longest = triton.next_power_of_2(cut.segments.longest)
        fixed: dict[str, Any] = {
            "p_bounds": cut.segments.bounds, "M": cut.segments.count, "H": heads,
            "N": batch * tokens, "TILES": of_q.dots.shape[0], "BLOCK": min(4096, max(16, longest)),
        }  # fmt: skip
        if of_k.crossing is None:
            fixed["p_crossing"] = None
        grid = (cut.segments.count, heads)
        launch = Launch(decay_gradient_kernel, grid, fixed=fixed, num_warps=8)
        cut.launches[key] = launch
    given = (of_q.dots, of_k.dots, of_k.crossing, out)
    launch(*[x for x in given if x is not None])
    return out
