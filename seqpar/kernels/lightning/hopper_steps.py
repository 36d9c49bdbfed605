# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Small steps of the passes by hand (output_pass_groups.py, output_pass_sums.py).

Legend: C tokens of a chunk, D head dim, R rows of a state that are worked on, H heads.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = [
    "LINE",
    "LINES",
    "TILE",
    "barrier",
    "clear_rows",
    "decay_rows",
    "fixed_pair_decays",
    "front_of",
    "head_decay",
    "last_decay",
    "load_tile",
    "rest_of",
    "room_for_parts",
    "segment_of",
    "state_entering",
    "store_parts",
    "stored_pair_decays",
    "times_parts",
    "token_decays",
    "widened",
    "write_columns",
]

LOG2E = gl.constexpr(1.4426950408889634)
LOWEST_LOG_DECAY = gl.constexpr(-100.0)
REACH_BITS = gl.constexpr(32.0)
NAN_STAYS = gl.constexpr(tl.PropagateNan.ALL)
TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
LINES = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))

# Triton 3.6 and 3.9 name these differently.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.jit
def segment_of(p_table, index):
    """A row of `Segments.table`."""
    p_row = p_table + index * 8
    i_m, start, stop = gl.load(p_row), gl.load(p_row + 1), gl.load(p_row + 2)
    i_s, before, behind = gl.load(p_row + 3), gl.load(p_row + 4), gl.load(p_row + 5)
    return i_m, start, stop, i_s, before, behind, gl.load(p_row + 6), gl.load(p_row + 7)


@gluon.jit
def head_decay(p_decay, i_h, DECAY: gl.constexpr):
    """The log2 decay of a head (0 unless it is fixed)."""
    log2_decay = 0.0
    if DECAY == 1:
        log_decay = gl.load(p_decay + i_h).to(gl.float32)
        log2_decay = gl.maximum(log_decay, LOWEST_LOG_DECAY, propagate_nan=NAN_STAYS) * LOG2E
    return log2_decay


@gluon.jit
def token_decays(p_head, slot, num_tokens, log2_decay, o_c, DECAY: gl.constexpr, C: gl.constexpr):
    """Of a chunk, [C] each: log2 decay through a token, that decay, and the decay behind it."""
    if DECAY == 2:
        p_rows = p_head + slot * (3 * C) + o_c
        reach, back, ahead = gl.load(p_rows), gl.load(p_rows + C), gl.load(p_rows + 2 * C)
    else:
        reach = (o_c + 1).to(gl.float32) * log2_decay
        back = gl.exp2(reach)
        ahead = gl.exp2(gl.maximum(num_tokens - 1 - o_c, 0).to(gl.float32) * log2_decay)
    return reach, back, ahead


@gluon.jit
def last_decay(p_head, slot, num_tokens, log2_decay, DECAY: gl.constexpr, C: gl.constexpr):
    """The log2 decay of a whole chunk."""
    last = num_tokens * log2_decay
    if DECAY == 2:
        last = gl.load(p_head + slot * (3 * C) + C - 1)
    return last


@gluon.jit
def pair_decays(b_up, b_across, REVERSE: gl.constexpr, C: gl.constexpr, L_P: gl.constexpr):
    """[j, i]: the decay between tokens j and i of a chunk, 0 where j is not before i.

    b_up [C, 1] and b_across [1, C] are the log2 decays through each token.
    """
    o_up = gl.arange(0, C, gl.SliceLayout(1, L_P))[:, None]
    o_across = gl.arange(0, C, gl.SliceLayout(0, L_P))[None, :]
    if REVERSE:
        b_gap = gl.where(o_up >= o_across, b_up - b_across, -float("inf"))
    else:
        b_gap = gl.where(o_up <= o_across, b_across - b_up, -float("inf"))
    return gl.exp2(b_gap)


@gluon.jit
def stored_pair_decays(s_reach, REVERSE: gl.constexpr, C: gl.constexpr, L_P: gl.constexpr):
    """The same of decays per token, whose log2 decays through each token lie in s_reach."""
    b_up = s_reach.load(gl.SliceLayout(1, L_P))[:, None]
    b_across = s_reach.load(gl.SliceLayout(0, L_P))[None, :]
    return pair_decays(b_up, b_across, REVERSE, C, L_P)


@gluon.jit
def fixed_pair_decays(log2_decay, REVERSE: gl.constexpr, C: gl.constexpr, L_P: gl.constexpr):
    """The same of a fixed decay: one for all chunks, also for one that is not full."""
    b_up = gl.arange(0, C, gl.SliceLayout(1, L_P)).to(gl.float32)[:, None] * log2_decay
    b_across = gl.arange(0, C, gl.SliceLayout(0, L_P)).to(gl.float32)[None, :] * log2_decay
    return pair_decays(b_up, b_across, REVERSE, C, L_P)


@gluon.jit
def clear_rows(s_tile, num_tokens, ROWS: gl.constexpr, STEP: gl.constexpr = 64):
    """Zero the rows of a tile that belong to the next segment, STEP at a time to save registers."""
    NUM_ROWS: gl.constexpr = s_tile.shape[0]
    for first in gl.static_range(0, NUM_ROWS, STEP):
        s_rows = s_tile.slice(first, STEP)
        o_c = first + gl.arange(0, STEP, gl.SliceLayout(1, ROWS))
        rows = s_rows.load(ROWS)
        zero = gl.full(s_rows.shape, 0.0, rows.dtype, ROWS)
        s_rows.store(gl.where((o_c < num_tokens)[:, None], rows, zero))


@gluon.jit
def front_of(b_x):
    """x [float32] cut to bfloat16."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;",
        constraints="=r,r,r", args=[b_x], dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def rest_of(b_x):
    """What `front_of` leaves of x, in bfloat16: both together are x to 2^-16."""
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 a, b;
        and.b32 a, $1, 0xffff0000;
        and.b32 b, $2, 0xffff0000;
        sub.f32 a, $1, a;
        sub.f32 b, $2, b;
        cvt.rn.bf16x2.f32 $0, b, a;
        }""",
        constraints="=r,r,r", args=[b_x], dtype=gl.bfloat16, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def widened(b_x):
    """bfloat16 as float32, two numbers at a time: left to itself, the compiler takes twice as many
    instructions."""
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        constraints="=r,=r,r", args=[b_x], dtype=gl.float32, is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def room_for_parts(dtype: gl.constexpr, TURNS: gl.constexpr, C: gl.constexpr):
    """Room for factors [C] in two parts: two buffers, so that writing both needs no barrier."""
    front = gl.allocate_shared_memory(dtype, [TURNS, C], LINE)
    return front, gl.allocate_shared_memory(dtype, [TURNS, C], LINE)


@gluon.jit
def times_parts(b_x, s_parts, stage, L: gl.constexpr):
    """b_x [_, C] bfloat16 times a factor [C] in two parts, rounded once, two numbers at a time."""
    b_front = s_parts[0].index(stage).load(gl.SliceLayout(0, L))[None, :]
    b_rest = s_parts[1].index(stage).load(gl.SliceLayout(0, L))[None, :]
    b_x, b_front = gl.broadcast(b_x, b_front)
    b_x, b_rest = gl.broadcast(b_x, b_rest)
    return gl.fma(b_x, b_front, b_x * b_rest)


@gluon.jit
def store_parts(s_parts, stage, factor, dtype: gl.constexpr):
    """A factor [C] as the sum of two numbers of the dtype."""
    front = factor.to(dtype)
    s_parts[0].index(stage).store(front)
    s_parts[1].index(stage).store((factor - front.to(gl.float32)).to(dtype))


@gluon.jit
def decay_rows(s_tile, s_parts, stage):
    """Multiply each row [_, D] bfloat16 by its factor [_] in two parts, rounded once, in place.

    For two warps, each thread of which has a row of 64, so that it reads one factor.
    """
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [32, 1], [2, 1], [1, 0])
    b_front = s_parts[0].index(stage).load(gl.SliceLayout(1, ROWS))[:, None]
    b_rest = s_parts[1].index(stage).load(gl.SliceLayout(1, ROWS))[:, None]
    D: gl.constexpr = s_tile.shape[1]
    for column in gl.static_range(0, D, 64):
        s_columns = s_tile.slice(column, 64, dim=1)
        b_x = s_columns.load(ROWS)
        b_x, b_f = gl.broadcast(b_x, b_front)
        b_x, b_r = gl.broadcast(b_x, b_rest)
        s_columns.store(gl.fma(b_x, b_f, b_x * b_r))


@gluon.jit
def state_entering(
    p_states, p_initial, p_by_segment, i_m, i_h, num_before, tokens_before, length, o_S, o_sequence,
    H, log2_decay, DECAY: gl.constexpr, REVERSE: gl.constexpr, SCAN: gl.constexpr,
    R: gl.constexpr, D: gl.constexpr, L_S: gl.constexpr,
):  # fmt: skip
    """R rows of the state [D, D] that enters segment i_m: those at `o_S`."""
    b_S = gl.zeros([R, D], gl.float32, L_S)
    distance = num_before * 0.0
    if SCAN:
        for i in range(0, num_before):
            if distance >= -REACH_BITS:
                i_p = i_m + 1 + i if REVERSE else i_m - 1 - i
                b_U = gl.load(p_states + (i_p * H + i_h).to(gl.int64) * (D * D) + o_S)
                b_S += b_U * gl.exp2(distance)
                if DECAY == 2:
                    distance += gl.load(p_by_segment + i_p * H + i_h)
                else:
                    distance += length * log2_decay
        if DECAY != 2:
            distance = tokens_before * log2_decay
    elif p_states is not None:
        b_S += gl.load(p_states + (i_m * H + i_h).to(gl.int64) * (D * D) + o_S)
    if p_initial is not None:
        b_S += gl.load(p_initial + o_sequence + o_S) * gl.exp2(distance)
    return b_S


@gluon.jit
def write_columns(
    d_w, p_w, s_w, row, num_tokens, column, H,
    C: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Store half of a chunk's columns of w: in one bulk copy, or only the segment's rows."""
    if num_tokens == C:
        store_tile(d_w, [row, column], s_w)
    else:
        o_r = gl.arange(0, C, gl.SliceLayout(1, ROWS))
        o_d = gl.arange(0, D // 2, gl.SliceLayout(0, ROWS))[None, :]
        p_out = p_w + (row + o_r).to(gl.int64)[:, None] * (H * D) + column + o_d
        gl.store(p_out, s_w.load(ROWS), mask=(o_r < num_tokens)[:, None])
