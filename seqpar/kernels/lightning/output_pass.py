# ruff: noqa: SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""The one pass that makes outputs, and with its roles exchanged every gradient.

Legend: N rows of all sequences, M segments, S sequences, H heads, C tokens of a chunk; x, y, z
play q, k, v: [N, H, DX], [N, H, DX], [N, H, DZ], and the state is [DX, DZ], carried transposed.

    forward in time    w_i = exp(G_i) x_i A + sum_(j<=i) exp(G_i - G_j) (x_i . y_j) z_j
    backward in time   w_i = exp(G_end - G_i) x_i E + sum_(j>=i) exp(G_j - G_i) (x_i . y_j) z_j

    o  = (x, y, z) = (q, k, v) forward        dv = (k, q, do) backward
    dq = (do, v, k) forward                   dk = (v, do, q) backward

G is the running sum of log decays within a chunk, A the state that enters it, E the gradient of
the state that leaves it. Every exponent that is used is <= 0.

The transposed form zᵀ (...) is what fits the matrix units: the state stays in the accumulator
registers of 128 x 128 products, is rounded there to the left operand of (state)ᵀ xᵀ, and never
passes through shared memory.

With GRAD, the tensor u whose gradient w is comes along, and u . w of every token leaves: what the
decays' gradient is summed from (decay_gradient.py). Those sums run over many tokens, so what has to
cancel in them must: states and their updates are then multiplied as two numbers of the dtype. In
float32 what a token takes from itself, which no decay touches, is added to w after u . w: where
decays are strong it would be nearly all of the sums, and its rounding more than what is left.

This is the pass for all dims and dtypes; output_pass_groups.py and output_pass_sums.py are the same
by hand for the common ones. Floor: x, y and z read once, w written once, with GRAD also u.
"""

from __future__ import annotations

import triton
import triton.language as tl

from seqpar.kernels.lightning.decays import REACH_BITS, head_decay, load_decays, load_last
from seqpar.kernels.lightning.state_pass import decayed, load_segment, load_tile
from seqpar.kernels.overlap import wait_for_launches_before

__all__ = ["output_pass_kernel"]


@triton.jit
def _entry_product(b_S, b_x, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Sᵀ xᵀ [DZ, C]. In float16 the state, which may exceed 65504, is scaled down and up again."""
    if b_x.dtype == tl.float16:
        top = tl.max(tl.max(tl.abs(b_S), 1), 0)
        scale = tl.exp2(-tl.maximum(tl.ceil(tl.log2(tl.maximum(top, 1e-30))) - 14.0, 0.0))
        b_S = b_S * scale
    b_high = b_S.to(b_x.dtype)
    b_w = tl.dot(b_high, tl.trans(b_x), input_precision=PRECISION)
    if SPLIT:
        b_low = (b_S - b_high.to(tl.float32)).to(b_x.dtype)
        b_w = tl.dot(b_low, tl.trans(b_x), b_w, input_precision=PRECISION)
    if b_x.dtype == tl.float16:
        b_w = b_w / scale
    return b_w


@triton.jit
def _pairs(
    b_x, b_y, b_reach, H, REVERSE: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """P [j, i] = (y_j . x_i) times the decay between j and i, 0 where j is not before i.

    The branch is always taken. Triton gives a product that another product uses all warps along
    its rows: of 64 rows each half of 8 warps would compute everything. It does not follow P out
    of the branch, and divides the product among the warps.
    """
    b_P = tl.zeros([C, C], b_x.dtype)
    if H > 0:
        o_c = tl.arange(0, C)
        if REVERSE:
            m_pair = o_c[:, None] >= o_c[None, :]
            b_gap = b_reach[:, None] - b_reach[None, :]
        else:
            m_pair = o_c[:, None] <= o_c[None, :]
            b_gap = b_reach[None, :] - b_reach[:, None]
        b_pairs = tl.dot(b_y, tl.trans(b_x), input_precision=PRECISION)
        b_P = (b_pairs * tl.exp2(tl.where(m_pair, b_gap, -float("inf")))).to(b_x.dtype)
    return b_P


@triton.jit
def _chunk(
    b_S, b_x, b_y, b_z, b_u, num_tokens, b_reach, b_back, b_ahead, last, p_dots, H,
    REVERSE: tl.constexpr, TAIL: tl.constexpr, GRAD: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk: wᵀ [DZ, C] and the state behind it, in float32. With GRAD also u . w."""
    o_c = tl.arange(0, C)
    if TAIL:
        m_row = (o_c < num_tokens)[:, None]
        b_y = tl.where(m_row, b_y, 0.0).to(b_y.dtype)
        b_z = tl.where(m_row, b_z, 0.0).to(b_z.dtype)
    split: tl.constexpr = GRAD and b_x.dtype != tl.float32
    apart: tl.constexpr = GRAD and b_x.dtype == tl.float32
    b_P = _pairs(b_x, b_y, b_reach, H, REVERSE, C, PRECISION)
    b_w = _entry_product(b_S, b_x, split, PRECISION)
    b_w = b_w * (b_ahead if REVERSE else b_back)[None, :]
    if apart:
        m_same = o_c[:, None] == o_c[None, :]
        b_own = tl.sum(tl.where(m_same, b_P, 0.0), 0)
        b_P = tl.where(m_same, 0.0, b_P)
    b_w = tl.dot(tl.trans(b_z), b_P, b_w, input_precision=PRECISION)
    if GRAD:
        b_dots = tl.sum(b_w * tl.trans(b_u).to(tl.float32), 0)
        tl.store(p_dots + o_c, b_dots, mask=o_c < num_tokens)
    if apart:
        b_w += tl.trans(b_z) * b_own[None, :]
    b_S = b_S * tl.exp2(last)
    b_factor = b_back if REVERSE else b_ahead
    if TAIL:
        b_factor = tl.where(o_c < num_tokens, b_factor, 0.0)
    if split:
        b_decayed = b_y.to(tl.float32) * b_factor[:, None]
        b_high = b_decayed.to(b_y.dtype)
        b_low = (b_decayed - b_high.to(tl.float32)).to(b_y.dtype)
        b_S = tl.dot(tl.trans(b_z), b_low, b_S, input_precision=PRECISION)
    else:
        b_high = decayed(b_y, b_factor)
    b_S = tl.dot(tl.trans(b_z), b_high, b_S, input_precision=PRECISION)
    return b_w, b_S


@triton.jit
def _dots_at(p_dots, row, i_h, i_z, H, N, GRAD: tl.constexpr):
    """Where u . w of a chunk goes, in [tiles of DZ, H, N]."""
    p_row = row  # not used without GRAD
    if GRAD:
        p_row = p_dots + (i_z * H + i_h).to(tl.int64) * N + row
    return p_row


@triton.jit
def _run_tail(
    d_x, d_y, d_z, d_u, p_w, d_reach, p_reach, stride_reach,
    p_dots, b_S, row, slot, stop, log2_decay,
    i_h, i_z, H, N, DX, DZ,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, GRAD: tl.constexpr, FLAT: tl.constexpr,
    C: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The last chunk of a segment, with fewer than C tokens: the rows behind it are another's."""
    b_x = load_tile(d_x, row, i_h, 0, DX, C, BX, FLAT)
    b_y = load_tile(d_y, row, i_h, 0, DX, C, BX, FLAT)
    b_z = load_tile(d_z, row, i_h, i_z * BZ, DZ, C, BZ, FLAT)
    b_u = b_z
    if GRAD:
        b_u = load_tile(d_u, row, i_h, i_z * BZ, DZ, C, BZ, FLAT)
    b_reach, b_back, b_ahead = load_decays(d_reach, slot, i_h, log2_decay, stop - row, C, DECAY)
    last = (stop - row) * log2_decay
    if DECAY == 2:
        last = load_last(p_reach, slot, i_h, stride_reach, C, DECAY)
    b_w, b_S = _chunk(
        b_S, b_x, b_y, b_z, b_u, stop - row, b_reach, b_back, b_ahead, last,
        _dots_at(p_dots, row, i_h, i_z, H, N, GRAD), H, REVERSE, True, GRAD, C, PRECISION,
    )  # fmt: skip
    o_row = row + tl.arange(0, C)
    o_z = i_z * BZ + tl.arange(0, BZ)[None, :]
    p_out = p_w + (o_row.to(tl.int64) * H + i_h)[:, None] * DZ + o_z
    tl.store(p_out, tl.trans(b_w.to(b_x.dtype)), mask=(o_row < stop)[:, None] & (o_z < DZ))
    return b_S


@triton.jit
def _run_segment(
    d_x, d_y, d_z, d_u, d_w, p_w, p_decay, d_reach, p_reach, stride_reach,
    p_dots, b_S, start, stop, i_m,
    i_h, i_z, H, N, DX, DZ,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, GRAD: tl.constexpr, FLAT: tl.constexpr,
    C: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run through the chunks of a segment in time order; returns the state that leaves it."""
    num_full = (stop - start) // C
    row_tail = start + num_full * C
    first_slot = start // C + i_m
    log2_decay = head_decay(p_decay, i_h, DECAY)
    if REVERSE:
        if row_tail < stop:
            b_S = _run_tail(
                d_x, d_y, d_z, d_u, p_w, d_reach, p_reach, stride_reach,
                p_dots, b_S,
                row_tail, first_slot + num_full, stop, log2_decay,
                i_h, i_z, H, N, DX, DZ, DECAY, REVERSE, GRAD, FLAT, C, BX, BZ, PRECISION,
            )  # fmt: skip
    first_chunk = tl.maximum(num_full - 1, 0) if REVERSE else 0
    next_last = load_last(p_reach, first_slot + first_chunk, i_h, stride_reach, C, DECAY)
    for i in tl.range(0, num_full, num_stages=STAGES):
        i_c = num_full - 1 - i if REVERSE else i
        row = start + i_c * C
        b_x = load_tile(d_x, row, i_h, 0, DX, C, BX, FLAT)
        b_y = load_tile(d_y, row, i_h, 0, DX, C, BX, FLAT)
        b_z = load_tile(d_z, row, i_h, i_z * BZ, DZ, C, BZ, FLAT)
        b_u = b_z
        if GRAD:
            b_u = load_tile(d_u, row, i_h, i_z * BZ, DZ, C, BZ, FLAT)
        b_reach, b_back, b_ahead = load_decays(
            d_reach, first_slot + i_c, i_h, log2_decay, C, C, DECAY
        )
        last = C * log2_decay
        if DECAY == 2:
            last = next_last
            next_chunk = tl.maximum(i_c - 1, 0) if REVERSE else i_c + 1
            next_last = load_last(p_reach, first_slot + next_chunk, i_h, stride_reach, C, DECAY)
        b_w, b_S = _chunk(
            b_S, b_x, b_y, b_z, b_u, C, b_reach, b_back, b_ahead, last,
            _dots_at(p_dots, row, i_h, i_z, H, N, GRAD), H, REVERSE, False, GRAD, C, PRECISION,
        )  # fmt: skip
        b_out = tl.trans(b_w.to(b_x.dtype))
        if FLAT:
            d_w.store([row, i_h * DZ + i_z * BZ], b_out)
        else:
            d_w.store([row, i_h, i_z * BZ], b_out.reshape(C, 1, BZ))
    if not REVERSE:
        if row_tail < stop:
            b_S = _run_tail(
                d_x, d_y, d_z, d_u, p_w, d_reach, p_reach, stride_reach,
                p_dots, b_S,
                row_tail, first_slot + num_full, stop, log2_decay,
                i_h, i_z, H, N, DX, DZ, DECAY, REVERSE, GRAD, FLAT, C, BX, BZ, PRECISION,
            )  # fmt: skip
    return b_S


@triton.jit
def _entering(
    p_states, p_initial, p_decay, p_by_segment, i_m, i_h, num_before, tokens_before, length,
    o_S, m_S, o_sequence, H, size,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """The state that enters segment i_m: what the segments before it add, nearest first, decayed.

    All segments between two of a sequence have `length` tokens. Nothing is read that is decayed
    below 2^-32.
    """
    b_S = tl.zeros([BZ, BX], tl.float32)
    log2_decay = head_decay(p_decay, i_h, DECAY)
    distance = tl.zeros([1, 1], tl.float32)
    for i in tl.range(0, num_before, num_stages=3):
        i_p = i_m + 1 + i if REVERSE else i_m - 1 - i
        p_S = p_states + (i_p * H + i_h).to(tl.int64) * size + o_S
        b_U = tl.load(p_S, mask=m_S & (distance >= -REACH_BITS), other=0.0)
        b_S += b_U * tl.exp2(distance)
        if DECAY == 2:
            distance += tl.load(p_by_segment + i_p * H + i_h)
        else:
            distance += length * log2_decay
    if p_initial is not None:
        if DECAY != 2:
            distance = tokens_before * log2_decay
        b_S += tl.load(p_initial + o_sequence + o_S, mask=m_S, other=0.0) * tl.exp2(distance)
    return b_S


@triton.jit(do_not_specialize=["N", "M", "length"])  # new with every batch
def output_pass_kernel(
    d_x, d_y, d_z, d_u, d_w, p_w, p_decay, d_reach, p_reach, stride_reach,
    p_by_segment, p_dots, p_crossing, p_exits, p_states, p_initial,
    p_final, p_table, H, N, M, DX, DZ, length, stride_x, stride_z, OVERLAP: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, GRAD: tl.constexpr, FLAT: tl.constexpr,
    SCAN: tl.constexpr, C: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w of every segment. Grid: (M * H, tiles of DZ); the longest segments start first.

    FLAT descriptors see rows of all heads, [N, H * D]; the others [N, H, D]. With SCAN, `states`
    is what each segment adds, and a program sums what the segments before its own add to
    `initial`; otherwise `states` is what enters each segment. With GRAD, the pass forward in time
    stores the states that leave segments in `exits`, if given, and the pass backward in time their
    products with their gradients in `crossing` [tiles of DZ, M, H].
    Example, C = 2, fixed decay 1/2, x = y = z = 1, nothing enters: w = 1, 3/2, 7/4, ...
    """
    i_z, i_h = tl.program_id(1), tl.program_id(0) % H
    i_m, start, stop, i_s, before, behind, begin, end = load_segment(p_table, tl.program_id(0) // H)
    wait_for_launches_before(OVERLAP)
    o_z = i_z * BZ + tl.arange(0, BZ)[:, None]
    o_x = tl.arange(0, BX)[None, :]
    m_S = (o_z < DZ) & (o_x < DX)
    o_S = o_z * stride_z + o_x * stride_x
    o_sequence = (i_s * H + i_h).to(tl.int64) * DX * DZ
    if SCAN:
        num_before = behind if REVERSE else before
        tokens_before = end - stop if REVERSE else start - begin
        b_S = _entering(
            p_states, p_initial, p_decay, p_by_segment, i_m, i_h, num_before, tokens_before, length,
            o_S, m_S, o_sequence, H, DX * DZ, DECAY, REVERSE, BX, BZ,
        )  # fmt: skip
    else:
        b_S = tl.zeros([BZ, BX], tl.float32)
        if p_initial is not None:
            b_S += tl.load(p_initial + o_sequence + o_S, mask=m_S, other=0.0)
        if p_states is not None:
            o_state = (i_m * H + i_h).to(tl.int64) * DX * DZ
            b_S += tl.load(p_states + o_state + o_S, mask=m_S, other=0.0)
    o_exit = (i_m * H + i_h).to(tl.int64) * DX * DZ
    if GRAD and REVERSE and p_exits is not None:
        b_exit = tl.load(p_exits + o_exit + o_S, mask=m_S, other=0.0)
        crossing = tl.sum(tl.sum(b_S * b_exit, 1), 0)
        tl.store(p_crossing + (i_z * M + i_m) * H + i_h, crossing)
    b_S = _run_segment(
        d_x, d_y, d_z, d_u, d_w, p_w, p_decay, d_reach, p_reach, stride_reach,
        p_dots, b_S, start, stop, i_m,
        i_h, i_z, H, N, DX, DZ, DECAY, REVERSE, GRAD, FLAT, C, BX, BZ, STAGES, PRECISION,
    )  # fmt: skip
    if p_final is not None:
        if (before if REVERSE else behind) == 0:
            tl.store(p_final + o_sequence + o_S, b_S, mask=m_S)
    if GRAD and not REVERSE and p_exits is not None:
        tl.store(p_exits + o_exit + o_S, b_S, mask=m_S)
