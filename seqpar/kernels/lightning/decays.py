# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Log decays as the kernels want them: base 2, summed within chunks, tokens side by side.

Legend: M segments, H heads, C tokens of a chunk, L chunk slots: chunk c of segment m has slot
bounds[m] // C + m + c, so that every chunk of every cut has its own.

Decays per token are read once, [B, T, H], and written as running sums within their chunk,
[H, L * C]: a chunk of one head is then one aligned load, and the passes need no scan of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from seqpar.kernels.lightning.segments import Segments

__all__ = ["Decays", "head_decay", "load_reach", "prepare_decays"]

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST_LOG_DECAY = tl.constexpr(-100.0)
REACH_BITS = tl.constexpr(32.0)


@dataclass(frozen=True)
class Decays:
    """The decays of one call and one cut."""

    kind: int
    """1: fixed per head, 2: per token."""
    per_head: Tensor | None = None
    """[H] natural log decays (kind 1)."""
    reach: Tensor | None = None
    """[H, L * C] log2 decay from the beginning of a token's chunk through the token (kind 2)."""
    totals: Tensor | None = None
    """[M, H] log2 decay of each segment (kind 2)."""
    windows_ahead: Tensor | None = None
    """[M, H] int32: full chunks before the segment's end that are not decayed below 2^-32."""
    windows_back: Tensor | None = None
    """[M, H] int32: the same from the segment's beginning."""

    def descriptor(self, chunk: int) -> Any:
        """A [1, chunk] window on `reach`, or None."""
        if self.reach is None:
            return None
        shape, stride = list(self.reach.shape), [self.reach.stride(0), 1]
        return TensorDescriptor(self.reach, shape, stride, [1, chunk])


@triton.jit
def head_decay(p_decay, i_h, DECAY: tl.constexpr):
    """The log2 decay of a head (0 unless it is fixed)."""
    log2_decay = 0.0
    if DECAY == 1:
        log2_decay = tl.maximum(tl.load(p_decay + i_h).to(tl.float32), LOWEST_LOG_DECAY) * LOG2E
    return log2_decay


@triton.jit
def load_reach(d_reach, slot, i_h, C: tl.constexpr, DECAY: tl.constexpr):
    """[C] running log2 decays of the chunk at `slot`; 0 unless per token.

    A bulk copy: every layout of use then reads shared memory, where a plain load of so few
    numbers would be repeated for each layout.
    """
    b_reach = 0.0
    if DECAY == 2:
        b_reach = d_reach.load([i_h, slot * C]).reshape(C)
    return b_reach


@triton.jit
def load_last(p_reach, slot, i_h, stride_reach, C: tl.constexpr, DECAY: tl.constexpr):
    """The log2 decay of the whole chunk at `slot`; 0 unless per token."""
    last = 0.0
    if DECAY == 2:
        last = tl.load(p_reach + i_h.to(tl.int64) * stride_reach + slot * C + C - 1)
    return last


@triton.jit
def chunk_decays_kernel(
    p_decay, p_reach, p_bounds, H, stride_reach, C: tl.constexpr, BH: tl.constexpr
):
    """Running sums of one chunk; they stay level behind the end of a segment.

    Grid: (chunks of the longest segment, M, head tiles).
    """
    i_c, i_m = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    row = start + i_c * C
    if row < stop:
        o_c = tl.arange(0, C)
        o_h = tl.program_id(2) * BH + tl.arange(0, BH)
        m_block = (row + o_c < stop)[:, None] & (o_h < H)[None, :]
        p_block = p_decay + (row + o_c).to(tl.int64)[:, None] * H + o_h[None, :]
        b_decay = tl.load(p_block, mask=m_block, other=0.0).to(tl.float32)
        b_reach = tl.cumsum(tl.maximum(b_decay, LOWEST_LOG_DECAY) * LOG2E, 0)
        o_slot = (start // C + i_m + i_c) * C + o_c
        p_out = p_reach + o_h.to(tl.int64)[None, :] * stride_reach + o_slot[:, None]
        tl.store(p_out, b_reach, mask=(o_h < H)[None, :])


@triton.jit
def segment_decays_kernel(
    p_reach,
    p_totals,
    p_ahead,
    p_back,
    p_bounds,
    H,
    stride_reach,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """totals, windows_ahead and windows_back of one segment and head. Grid: (M, H)."""
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    num_chunks = tl.cdiv(stop - start, C)
    num_full = (stop - start) // C
    p_segment = p_reach + i_h.to(tl.int64) * stride_reach + (start // C + i_m) * C + C - 1
    total, back = 0.0, 0
    for i in range(0, num_chunks, BLOCK):
        o_c = i + tl.arange(0, BLOCK)
        b_sum = tl.load(p_segment + o_c * C, mask=o_c < num_chunks, other=0.0)
        b_before = total + tl.cumsum(b_sum, 0) - b_sum
        back += tl.sum(((b_before >= -REACH_BITS) & (o_c < num_full)).to(tl.int32), 0)
        total += tl.sum(b_sum, 0)
    behind, ahead = 0.0, 0
    for i in range(0, num_chunks, BLOCK):
        o_c = i + tl.arange(0, BLOCK)
        b_sum = tl.load(p_segment + o_c * C, mask=o_c < num_chunks, other=0.0)
        b_after = total - behind - tl.cumsum(b_sum, 0)
        ahead += tl.sum(((b_after >= -REACH_BITS) & (o_c < num_full)).to(tl.int32), 0)
        behind += tl.sum(b_sum, 0)
    tl.store(p_totals + i_m * H + i_h, total)
    tl.store(p_ahead + i_m * H + i_h, ahead)
    tl.store(p_back + i_m * H + i_h, back)


def prepare_decays(log_decay: Tensor, segments: Segments, chunk: int) -> Decays:
    """The decays of a call: float32, contiguous, [H] or [B, T, H]."""
    if log_decay.ndim == 1:
        return Decays(1, per_head=log_decay)
    heads = log_decay.shape[2]
    num_slots = log_decay.shape[0] * log_decay.shape[1] // chunk + segments.count + 1
    reach = log_decay.new_empty(heads, num_slots * chunk)
    grid = (triton.cdiv(segments.longest, chunk), segments.count, triton.cdiv(heads, 16))
    chunk_decays_kernel[grid](
        log_decay, reach, segments.bounds, heads, reach.stride(0), C=chunk, BH=16
    )
    totals = log_decay.new_empty(segments.count, heads)
    ahead, back = (torch.empty_like(totals, dtype=torch.int32) for _ in range(2))
    segment_decays_kernel[(segments.count, heads)](
        reach, totals, ahead, back, segments.bounds, heads, reach.stride(0), C=chunk, BLOCK=256
    )
    return Decays(2, reach=reach, totals=totals, windows_ahead=ahead, windows_back=back)
