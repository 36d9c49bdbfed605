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
"""

# ruff: noqa: SIM102, SIM108
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.lightning.segments import Segments
from seqpar.kernels.lightning.state_pass import (
    LOG2E,
    LOWEST_LOG_DECAY,
    decay_kind,
    decayed,
    descriptor,
    load_decay,
    precision,
)
from seqpar.kernels.lightning.tuning import Config, padded

__all__ = ["output_pass"]


@triton.jit
def _entry_product(b_S, b_x, PRECISION: tl.constexpr):
    """Sᵀ xᵀ [DZ, C]. In float16 the state, which may exceed 65504, is scaled down and up again."""
    if b_x.dtype == tl.float16:
        top = tl.max(tl.max(tl.abs(b_S), 1), 0)
        scale = tl.exp2(-tl.maximum(tl.ceil(tl.log2(tl.maximum(top, 1e-30))) - 14.0, 0.0))
        return tl.dot((b_S * scale).to(b_x.dtype), tl.trans(b_x)) / scale
    return tl.dot(b_S.to(b_x.dtype), tl.trans(b_x), input_precision=PRECISION)


@triton.jit
def _chunk(
    b_S, b_x, b_y, b_z, num_tokens, log2_decay,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, TAIL: tl.constexpr,
    C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk: wᵀ [DZ, C] and the state behind it, both float32."""
    o_c = tl.arange(0, C)
    if TAIL:
        m_row = (o_c < num_tokens)[:, None]
        b_y = tl.where(m_row, b_y, 0.0).to(b_y.dtype)
        b_z = tl.where(m_row, b_z, 0.0).to(b_z.dtype)
    b_P = tl.dot(b_y, tl.trans(b_x), input_precision=PRECISION)  # [j, i]
    b_w = _entry_product(b_S, b_x, PRECISION)
    if REVERSE:
        m_pair = o_c[:, None] >= o_c[None, :]
    else:
        m_pair = o_c[:, None] <= o_c[None, :]
    if DECAY == 0:
        b_P = tl.where(m_pair, b_P, 0.0)
    else:
        if DECAY == 1:
            b_reach = (o_c + 1).to(tl.float32) * log2_decay
            last = num_tokens * log2_decay
        else:
            b_reach = tl.cumsum(log2_decay, 0)
            last = tl.sum(log2_decay, 0)
        b_back = tl.exp2(b_reach)
        b_ahead = tl.exp2(tl.minimum(last - b_reach, 0.0))
        b_gap = b_reach[:, None] - b_reach[None, :]
        if not REVERSE:
            b_gap = -b_gap
        b_P = b_P * tl.where(m_pair, tl.exp2(tl.minimum(b_gap, 0.0)), 0.0)
        b_w = b_w * (b_ahead if REVERSE else b_back)[None, :]
    b_w = tl.dot(tl.trans(b_z), b_P.to(b_z.dtype), b_w, input_precision=PRECISION)
    if DECAY > 0:
        b_S = b_S * tl.exp2(last)
        b_factor = b_back if REVERSE else b_ahead
        if TAIL:
            b_factor = tl.where(o_c < num_tokens, b_factor, 0.0)
        b_y = decayed(b_y, b_factor)
    b_S = tl.dot(tl.trans(b_z), b_y, b_S, input_precision=PRECISION)
    return b_w, b_S


@triton.jit
def _run_segment(
    d_x, d_y, d_z, d_w, p_w, stride_w_row, stride_w_head, p_decay, b_S, start, stop,
    i_h, i_z, H, DZ,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr,
    BX: tl.constexpr, BZ: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run through the chunks of a segment in time order; returns the state that leaves it."""
    num_full = (stop - start) // C
    row_tail = start + num_full * C
    log2_decay = 0.0
    if DECAY == 1:
        log2_decay = tl.maximum(tl.load(p_decay + i_h).to(tl.float32), LOWEST_LOG_DECAY) * LOG2E
    if REVERSE:
        if row_tail < stop:
            b_S = _run_tail(
                d_x, d_y, d_z, p_w, stride_w_row, stride_w_head, p_decay, b_S, row_tail, stop,
                i_h, i_z, H, DZ, log2_decay, DECAY, REVERSE, C, BX, BZ, PRECISION,
            )  # fmt: skip
    if DECAY == 2:
        row_next = tl.maximum(row_tail - C, start) if REVERSE else start
        b_next = load_decay(p_decay, row_next, stop, i_h, H, C)
    for i in tl.range(0, num_full, num_stages=STAGES):
        row = start + (num_full - 1 - i if REVERSE else i) * C
        b_x = d_x.load([row, i_h, 0]).reshape(C, BX)
        b_y = d_y.load([row, i_h, 0]).reshape(C, BX)
        b_z = d_z.load([row, i_h, i_z * BZ]).reshape(C, BZ)
        b_log2 = log2_decay
        if DECAY == 2:
            b_log2 = b_next
            row_next = tl.maximum(row - C, start) if REVERSE else row + C
            b_next = load_decay(p_decay, row_next, stop, i_h, H, C)
        b_w, b_S = _chunk(b_S, b_x, b_y, b_z, C, b_log2, DECAY, REVERSE, False, C, PRECISION)
        d_w.store([row, i_h, i_z * BZ], tl.trans(b_w.to(b_x.dtype)).reshape(C, 1, BZ))
    if not REVERSE:
        if row_tail < stop:
            b_S = _run_tail(
                d_x, d_y, d_z, p_w, stride_w_row, stride_w_head, p_decay, b_S, row_tail, stop,
                i_h, i_z, H, DZ, log2_decay, DECAY, REVERSE, C, BX, BZ, PRECISION,
            )  # fmt: skip
    return b_S


@triton.jit
def _run_tail(
    d_x, d_y, d_z, p_w, stride_w_row, stride_w_head, p_decay, b_S, row, stop, i_h, i_z, H, DZ,
    log2_decay,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr,
    BX: tl.constexpr, BZ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The last chunk of a segment, with fewer than C tokens: the rows behind it are another's."""
    b_x = d_x.load([row, i_h, 0]).reshape(C, BX)
    b_y = d_y.load([row, i_h, 0]).reshape(C, BX)
    b_z = d_z.load([row, i_h, i_z * BZ]).reshape(C, BZ)
    b_log2 = log2_decay
    if DECAY == 2:
        b_log2 = load_decay(p_decay, row, stop, i_h, H, C)
    b_w, b_S = _chunk(b_S, b_x, b_y, b_z, stop - row, b_log2, DECAY, REVERSE, True, C, PRECISION)
    o_row = row + tl.arange(0, C)[:, None]
    o_z = i_z * BZ + tl.arange(0, BZ)[None, :]
    p_out = p_w + o_row.to(tl.int64) * stride_w_row + i_h * stride_w_head + o_z
    tl.store(p_out, tl.trans(b_w.to(b_x.dtype)), mask=(o_row < stop) & (o_z < DZ))
    return b_S


@triton.jit
def output_pass_kernel(
    d_x, d_y, d_z, d_w, p_w, stride_w_row, stride_w_head,
    p_decay, p_entries, p_totals, p_initial, p_final,
    p_bounds, p_sequence, p_first, p_order, H, DX, DZ, stride_x, stride_z,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr,
    BX: tl.constexpr, BZ: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """w of one segment, head and tile of DZ. Grid: (M * H, tiles of DZ).

    Example, C = 2, fixed decay 1/2, x = y = z = 1, nothing enters: w = 1, 3/2, 7/4, ...
    """
    i_z, i_h = tl.program_id(1), tl.program_id(0) % H
    i_m = tl.load(p_order + tl.program_id(0) // H)
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    i_s = tl.load(p_sequence + i_m)
    first, end = tl.load(p_first + i_s), tl.load(p_first + i_s + 1)
    o_z = i_z * BZ + tl.arange(0, BZ)[:, None]
    o_x = tl.arange(0, BX)[None, :]
    m_S = (o_z < DZ) & (o_x < DX)
    o_S = o_z * stride_z + o_x * stride_x
    b_S = tl.zeros([BZ, BX], tl.float32)
    if p_entries is not None:
        b_S += tl.load(
            p_entries + (i_m * H + i_h).to(tl.int64) * DX * DZ + o_S, mask=m_S, other=0.0
        )
    if p_initial is not None:
        reach = 0.0
        if DECAY == 1:
            tokens = start - tl.load(p_bounds + first)
            if REVERSE:
                tokens = tl.load(p_bounds + end) - stop
            log2_decay = tl.maximum(tl.load(p_decay + i_h).to(tl.float32), LOWEST_LOG_DECAY) * LOG2E
            reach = tokens.to(tl.float32) * log2_decay
        elif DECAY == 2:
            for i in range(i_m + 1 if REVERSE else first, end if REVERSE else i_m):
                reach += tl.load(p_totals + i * H + i_h)
        o_initial = (i_s * H + i_h).to(tl.int64) * DX * DZ
        b_S += tl.exp2(reach) * tl.load(p_initial + o_initial + o_S, mask=m_S, other=0.0)
    b_S = _run_segment(
        d_x, d_y, d_z, d_w, p_w, stride_w_row, stride_w_head, p_decay, b_S, start, stop, i_h, i_z,
        H, DZ, DECAY, REVERSE, C, BX, BZ, STAGES, PRECISION,
    )  # fmt: skip
    if p_final is not None:
        if i_m == (first if REVERSE else end - 1):
            tl.store(p_final + (i_s * H + i_h).to(tl.int64) * DX * DZ + o_S, b_S, mask=m_S)


def output_pass(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    out: Tensor,
    log_decay: Tensor | None,
    totals: Tensor | None,
    segments: Segments,
    config: Config,
    *,
    entries: Tensor | None,
    initial: Tensor | None,
    final: Tensor | None,
    reverse: bool,
    transposed: bool,
) -> None:
    """Write w into `out`, and what leaves each sequence into `final` if given.

    `transposed` says that states lie in memory as [DZ, DX] rather than [DX, DZ].
    """
    heads, dim_x, dim_z = x.shape[2], x.shape[3], z.shape[3]
    tile_x, tile_z = padded(dim_x), config.value_tile
    output_pass_kernel[(segments.count * heads, triton.cdiv(dim_z, tile_z))](
        descriptor(x, config.chunk, tile_x),
        descriptor(y, config.chunk, tile_x),
        descriptor(z, config.chunk, tile_z),
        descriptor(out, config.chunk, tile_z),
        out,
        out.stride(1),
        out.stride(2),
        log_decay,
        entries,
        totals,
        initial,
        final,
        segments.bounds,
        segments.sequence,
        segments.first,
        segments.by_length,
        heads,
        dim_x,
        dim_z,
        1 if transposed else dim_z,
        dim_x if transposed else 1,
        DECAY=decay_kind(log_decay),
        REVERSE=reverse,
        C=config.chunk,
        BX=tile_x,
        BZ=tile_z,
        STAGES=config.num_stages,
        PRECISION=precision(x.dtype),
        num_warps=config.num_warps,
    )
