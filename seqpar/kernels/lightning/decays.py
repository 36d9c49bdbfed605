# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Log decays as the kernels want them: base 2, summed within chunks, tokens side by side.

Legend: M segments, H heads, C tokens of a chunk, L chunk slots: chunk c of segment m has slot
bounds[m] // C + m + c, so that every chunk of every cut has its own.

Decays per token are read once, [B, T, H], and written as running sums within their chunk and two
powers of them, [H, L * 3 * C]: a chunk of one head is then three aligned loads, and the passes need
no scan and few exponentials of their own.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning.plan import Cut

__all__ = [
    "Decays",
    "head_decay",
    "load_decays",
    "load_last",
    "load_row",
    "prepare_decays",
    "sequence_decays",
]

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST_LOG_DECAY = tl.constexpr(-100.0)
REACH_BITS = tl.constexpr(32.0)


class Decays(NamedTuple):
    """The decays of one call and one cut: fixed per head, or per token."""

    per_head: Tensor | None
    """[H] natural log decays, fixed."""
    reach: Tensor | None = None
    """[H, L * 3 * C]: of each chunk the log2 decay from its beginning through a token, the decay
    itself, and the decay from there to the chunk's end."""
    by_segment: Tensor | None = None
    """[3, M, H]: log2 decay of each segment; then how many full chunks before its end, and how many
    from its beginning, are not decayed below 2^-32."""

    @property
    def kind(self) -> int:
        """1: fixed per head, 2: per token."""
        return 1 if self.reach is None else 2


@triton.jit
def bounded(log_decay):
    """A log decay, at least the lowest; NaN stays NaN, rather than being taken for a reset."""
    return tl.maximum(log_decay, LOWEST_LOG_DECAY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def head_decay(p_decay, i_h, DECAY: tl.constexpr):
    """The log2 decay of a head (0 unless it is fixed)."""
    log2_decay = 0.0
    if DECAY == 1:
        log2_decay = bounded(tl.load(p_decay + i_h).to(tl.float32)) * LOG2E
    return log2_decay


@triton.jit
def load_row(d_reach, slot, row, i_h, C: tl.constexpr):
    """[C] of a chunk's row: 0 log2 decay through a token, 1 the decay itself, 2 from it to the end.

    A bulk copy: every layout of use then reads shared memory, where a plain load of so few
    numbers would be repeated for each layout.
    """
    return d_reach.load([i_h, (slot * 3 + row) * C]).reshape(C)


@triton.jit
def load_decays(d_reach, slot, i_h, log2_decay, num_tokens, C: tl.constexpr, DECAY: tl.constexpr):
    """Of a chunk, [C] each: log2 decay through a token, that decay, and the decay behind it."""
    if DECAY == 2:
        b_reach = load_row(d_reach, slot, 0, i_h, C)
        b_back = load_row(d_reach, slot, 1, i_h, C)
        b_ahead = load_row(d_reach, slot, 2, i_h, C)
    else:
        o_c = tl.arange(0, C)
        b_reach = (o_c + 1).to(tl.float32) * log2_decay
        b_back = tl.exp2(b_reach)
        b_ahead = tl.exp2(tl.maximum(num_tokens - 1 - o_c, 0).to(tl.float32) * log2_decay)
    return b_reach, b_back, b_ahead


@triton.jit
def load_last(p_reach, slot, i_h, stride_reach, C: tl.constexpr, DECAY: tl.constexpr):
    """The log2 decay of the whole chunk at `slot`; 0 unless per token."""
    last = 0.0
    if DECAY == 2:
        last = tl.load(p_reach + i_h.to(tl.int64) * stride_reach + slot * 3 * C + C - 1)
    return last


@triton.jit(do_not_specialize=["chunks"])  # new with every batch
def chunk_decays_kernel(
    p_decay, p_reach, p_bounds, chunks, H, stride_reach, C: tl.constexpr, BH: tl.constexpr
):
    """The three rows of one chunk (`load_row`); sums stay level behind the end of a segment.

    Grid: (M * chunks of the longest segment, head tiles).
    """
    i_c, i_m = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    row = start + i_c * C
    if row < stop:
        o_c = tl.arange(0, C)
        o_h = tl.program_id(1) * BH + tl.arange(0, BH)
        m_block = (row + o_c < stop)[:, None] & (o_h < H)[None, :]
        p_block = p_decay + (row + o_c).to(tl.int64)[:, None] * H + o_h[None, :]
        b_decay = tl.load(p_block, mask=m_block, other=0.0).to(tl.float32)
        b_reach = tl.cumsum(bounded(b_decay) * LOG2E, 0)
        b_last = tl.min(b_reach, 0)
        o_slot = (start // C + i_m + i_c) * 3 * C + o_c
        p_out = p_reach + o_h.to(tl.int64)[None, :] * stride_reach + o_slot[:, None]
        m_head = (o_h < H)[None, :]
        tl.store(p_out, b_reach, mask=m_head)
        tl.store(p_out + C, tl.exp2(b_reach), mask=m_head)
        tl.store(p_out + 2 * C, tl.exp2(b_last[None, :] - b_reach), mask=m_head)


@triton.jit(do_not_specialize=["M"])  # the number of segments: new with every batch
def segment_decays_kernel(
    p_reach, p_table, p_bounds, M, H, stride_reach, C: tl.constexpr, BLOCK: tl.constexpr
):
    """`by_segment` of one segment and head; what NaN decays counts as read. Grid: (M, H)."""
    i_m, i_h = tl.program_id(0), tl.program_id(1)
    start, stop = tl.load(p_bounds + i_m), tl.load(p_bounds + i_m + 1)
    num_chunks = tl.cdiv(stop - start, C)
    num_full = (stop - start) // C
    p_segment = p_reach + i_h.to(tl.int64) * stride_reach + (start // C + i_m) * 3 * C + C - 1
    total, back = 0.0, 0
    for i in range(0, num_chunks, BLOCK):
        o_c = i + tl.arange(0, BLOCK)
        b_sum = tl.load(p_segment + o_c * 3 * C, mask=o_c < num_chunks, other=0.0)
        b_before = total + tl.cumsum(b_sum, 0) - b_sum
        back += tl.sum((~(b_before < -REACH_BITS) & (o_c < num_full)).to(tl.int32), 0)
        total += tl.sum(b_sum, 0)
    behind, ahead = 0.0, 0
    for i in range(0, num_chunks, BLOCK):
        o_c = i + tl.arange(0, BLOCK)
        b_sum = tl.load(p_segment + o_c * 3 * C, mask=o_c < num_chunks, other=0.0)
        b_after = total - behind - tl.cumsum(b_sum, 0)
        ahead += tl.sum((~(b_after < -REACH_BITS) & (o_c < num_full)).to(tl.int32), 0)
        behind += tl.sum(b_sum, 0)
    p_entry = p_table + i_m * H + i_h
    tl.store(p_entry, total)
    tl.store(p_entry + M * H, 1.0 * ahead)
    tl.store(p_entry + 2 * M * H, 1.0 * back)


@triton.jit
def sequence_decays_kernel(p_segments, p_out, p_first, H, BH: tl.constexpr):
    """out[s, h]: the natural log decay of a sequence, from its segments'. Grid: (S, head tiles)."""
    i_s = tl.program_id(0)
    o_h = tl.program_id(1) * BH + tl.arange(0, BH)
    first, stop = tl.load(p_first + i_s), tl.load(p_first + i_s + 1)
    b_sum = tl.zeros([BH], tl.float32)
    for i_m in range(first, stop):
        b_sum += tl.load(p_segments + i_m * H + o_h, mask=o_h < H, other=0.0)
    tl.store(p_out + i_s * H + o_h, b_sum * (1.0 / LOG2E), mask=o_h < H)


def prepare_decays(log_decay: Tensor, cut: Cut, chunk: int) -> Decays:
    """The decays of a call: float32, contiguous, [H] or [B, T, H]."""
    if log_decay.ndim == 1:
        return Decays(log_decay)
    batch, tokens, heads = log_decay.shape
    count = cut.segments.count
    num_slots = batch * tokens // chunk + count + 1
    reach = log_decay.new_empty(heads, num_slots * 3 * chunk)
    by_segment = log_decay.new_empty(3, count, heads)
    launches = cut.launches.get("decays")
    if launches is None:
        launches = cut.launches["decays"] = _launches(cut, heads, num_slots * 3 * chunk, chunk)
    launches[0](log_decay, reach)
    launches[1](reach, by_segment)
    return Decays(None, reach, by_segment)


def sequence_decays(decays: Decays, cut: Cut) -> Tensor:
    """[S, H] float32: the natural log decay of each sequence, where decays are per token."""
    assert decays.by_segment is not None
    segments, heads = cut.segments, decays.by_segment.shape[2]
    launch = cut.launches.get("sequence decays")
    if launch is None:
        launch = cut.launches["sequence decays"] = Launch(
            sequence_decays_kernel,
            (segments.num_sequences, triton.cdiv(heads, 16)),
            fixed={"p_first": segments.first, "H": heads, "BH": 16},
        )
    out = decays.by_segment.new_empty(segments.num_sequences, heads)
    launch(decays.by_segment, out)
    return out


def _launches(cut: Cut, heads: int, stride_reach: int, chunk: int) -> tuple[Launch, Launch]:
    segments = cut.segments
    shared = {"p_bounds": segments.bounds, "H": heads, "stride_reach": stride_reach, "C": chunk}
    chunks = triton.cdiv(segments.longest, chunk)
    return (
        Launch(
            chunk_decays_kernel,
            (segments.count * chunks, triton.cdiv(heads, 16)),
            fixed={**shared, "chunks": chunks, "BH": 16},
        ),
        Launch(
            segment_decays_kernel,
            (segments.count, heads),
            fixed={**shared, "M": segments.count, "BLOCK": 256},
        ),
    )
