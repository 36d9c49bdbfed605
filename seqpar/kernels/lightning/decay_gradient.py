# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""The gradient of decays per token.

Legend: N rows of all sequences, M segments, H heads, K key dim, V value dim. Block b of segment m,
of 256 tokens, has slot bounds[m] // 256 + m + b, so that every block of every cut has its own.

With G the running sum of log decays, and S the state that leaves a segment, E its gradient,

    dL/dG_i = q_i . dq_i - k_i . dk_i,     dL/dg_t = <S, E> + sum_(i >= t) dL/dG_i

over the tokens i of t's segment (Dao and Gu, arXiv 2405.21060, appendix). The passes that make dq
and dk give q . dq and k . dk before they are rounded, and <S, E>. By hand the pass of dk, which
runs backward in time itself, reads q . dq and gives the gradient (output_pass_sums.py); what
Triton's passes give, in tiles of columns that different programs make, two kernels here add up.

The sum keeps what crosses t and has to cancel the rest, tens of thousands of tokens of it. It does
because both passes work with the same numbers: pairs of one chunk are rounded alike in both; states
are multiplied as sums of two numbers, and so is what is added to them or, by hand, it is rounded
once and alike in both: what one pass adds to a state is, to 2^-16, what the other reads from it.
Then errors do not add up along the sequence.
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
from seqpar.kernels.overlap import can_overlap, wait_for_launches_before

__all__ = ["decay_gradient", "learn"]

_BLOCK, _HEADS = 256, 16
"""Tokens and heads of a program that adds up along the sequence."""


@triton.jit
def _block(
    p_from_q, p_from_k, p_bounds, i_m, i_b, i_g, H, N,
    TILES: tl.constexpr, BLOCK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """[BH, BLOCK]: from_q - from_k of a block of a segment's tokens and some heads; 0 outside."""
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    o_row = start + i_b * BLOCK + tl.arange(0, BLOCK)
    o_h = i_g * BH + tl.arange(0, BH)
    m_block = (o_h < H)[:, None] & (o_row < stop)[None, :]
    b_dreach = tl.zeros([BH, BLOCK], tl.float32)
    for i_k in tl.static_range(TILES):
        o_part = (i_k * H + o_h).to(tl.int64)[:, None] * N + o_row[None, :]
        b_dreach += tl.load(p_from_q + o_part, mask=m_block, other=0.0)
        b_dreach -= tl.load(p_from_k + o_part, mask=m_block, other=0.0)
    return b_dreach


@triton.jit(do_not_specialize=["N", "stride_sums"])  # new with every batch
def block_sums_kernel(
    p_from_q, p_from_k, p_sums, p_bounds, H, N, stride_sums, OVERLAP: tl.constexpr,
    TILES: tl.constexpr, BLOCK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Sums of from_q - from_k over blocks of tokens. Grid: (M, blocks, head tiles)."""
    i_m, i_b, i_g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    wait_for_launches_before(OVERLAP)
    if start + i_b * BLOCK < stop:
        b_dreach = _block(
            p_from_q, p_from_k, p_bounds, i_m, i_b, i_g, H, N, TILES, BLOCK, BH
        )  # fmt: skip
        o_h = i_g * BH + tl.arange(0, BH)
        p_out = p_sums + o_h * stride_sums + start // BLOCK + i_m + i_b
        tl.store(p_out, tl.sum(b_dreach, 1), mask=o_h < H)


@triton.jit(do_not_specialize=["M", "N", "stride_sums"])  # new with every batch
def decay_gradient_kernel(
    p_from_q, p_from_k, p_crossing, p_sums, p_out, p_bounds, M, H, N, stride_sums,
    OVERLAP: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """out[t, h] = crossing[m, h] + the sum, from t to its segment's end, of from_q - from_k.

    from_q, from_k and crossing come in parts, each of some columns of K, to be summed. A program
    adds up the sums of the blocks behind its own. Grid: (M, blocks, head tiles).
    """
    i_m, i_b, i_g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    wait_for_launches_before(OVERLAP)
    if start + i_b * BLOCK < stop:
        o_h = i_g * BH + tl.arange(0, BH)
        behind = tl.zeros([BH], tl.float32)
        if p_crossing is not None:
            for i_k in tl.static_range(TILES):
                behind += tl.load(p_crossing + (i_k * M + i_m) * H + o_h, mask=o_h < H, other=0.0)
        p_first = p_sums + o_h[:, None] * stride_sums + start // BLOCK + i_m
        num_blocks = tl.cdiv(stop - start, BLOCK)
        for i in range(i_b + 1, num_blocks, BLOCK):
            o_b = i + tl.arange(0, BLOCK)[None, :]
            m_sums = (o_h < H)[:, None] & (o_b < num_blocks)
            behind += tl.sum(tl.load(p_first + o_b, mask=m_sums, other=0.0), 1)
        b_dreach = _block(
            p_from_q, p_from_k, p_bounds, i_m, i_b, i_g, H, N, TILES, BLOCK, BH
        )  # fmt: skip
        b_out = behind[:, None] + tl.cumsum(b_dreach, 1, reverse=True)
        o_row = start + i_b * BLOCK + tl.arange(0, BLOCK)
        m_out = (o_row < stop)[:, None] & (o_h < H)[None, :]
        p_rows = p_out + o_row.to(tl.int64)[:, None] * H + o_h[None, :]
        tl.store(p_rows, tl.trans(b_out), mask=m_out)


def learn(
    q: Tensor, k: Tensor, value_dim: int, cut: Cut, tile: int, *, passed_on: bool, by_hand: bool
) -> tuple[Learning, Learning]:
    """What the passes that make dq and dk are to write; `passed_on`: a gradient reaches a state
    that leaves a segment.
    """
    batch, tokens, heads, key_dim = q.shape
    tiles, count = triton.cdiv(key_dim, tile), cut.segments.count

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    leaving = empty(count, heads, key_dim, value_dim) if passed_on else None
    of_q = Learning(q, empty(tiles, heads, batch * tokens), leaving)
    if by_hand:
        return of_q, Learning(k, of_q.dots, leaving, decay_grad=empty(batch, tokens, heads))
    crossing = empty(tiles, count, heads) if passed_on else None
    return of_q, Learning(k, empty(tiles, heads, batch * tokens), leaving, crossing)


def decay_gradient(of_q: Learning, of_k: Learning, cut: Cut) -> Tensor:
    """[B, T, H] float32: the gradient of decays per token, after both passes."""
    if of_k.decay_grad is not None:
        return of_k.decay_grad
    batch, tokens, heads, _ = of_q.of.shape
    parts, device = of_q.dots.shape[0], of_q.of.device
    num_slots = batch * tokens // _BLOCK + cut.segments.count + 1
    sums = torch.empty(heads, num_slots, dtype=torch.float32, device=device)
    out = torch.empty(batch, tokens, heads, dtype=torch.float32, device=device)
    key = ("decay gradient", of_k.crossing is None)
    launches = cut.launches.get(key)
    if launches is None:
        launches = _launches(cut, heads, batch * tokens, num_slots, parts, of_k.crossing, device)
        cut.launches[key] = launches
    launches[0](of_q.dots, of_k.dots, sums)
    given = (of_q.dots, of_k.dots, of_k.crossing, sums, out)
    launches[1](*[x for x in given if x is not None])
    return out


def _launches(
    cut: Cut,
    heads: int,
    num_tokens: int,
    num_slots: int,
    parts: int,
    crossing: Tensor | None,
    device: torch.device,
) -> tuple[Launch, Launch]:
    segments = cut.segments
    fixed: dict[str, Any] = {
        "p_bounds": segments.bounds, "H": heads, "N": num_tokens, "stride_sums": num_slots,
        "TILES": parts, "BLOCK": _BLOCK, "BH": _HEADS,
    }  # fmt: skip
    last = {**fixed, "M": segments.count}
    if crossing is None:
        last["p_crossing"] = None
    grid = (segments.count, triton.cdiv(segments.longest, _BLOCK), triton.cdiv(heads, _HEADS))
    return (
        Launch(block_sums_kernel, grid, fixed=fixed, overlap=can_overlap(device)),
        Launch(decay_gradient_kernel, grid, fixed=last, overlap=can_overlap(device)),
    )
