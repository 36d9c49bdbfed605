# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Sums for the decays' gradient, of the pass by hand that takes them (output_pass_sums.py).

What is summed is u·w of each token, u being q or k. Lanes and warps add up columns, two halves of
four warps each store theirs, and one warp puts these together and, backward in time, adds up along
the tokens.

Legend: C tokens of a chunk, R columns of w in one half, H heads.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = ["IN_EACH_WARP", "IN_WARP", "give_sums", "sum_lanes", "summed", "tokens_of"]

IN_WARP = gl.constexpr(gl.BlockedLayout([2], [32], [1], [0]))
"""Of [C] for C = 64, in a group of one warp."""

IN_EACH_WARP = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
"""The same in a group of four, each of which holds all of it."""


@gluon.jit
def _share_with_lane(b_x, LANE: gl.constexpr):
    """[A, B, C // 2, E] of x [A, B, C, E]: sums over what lanes LANE apart hold, in two columns.

    One lane adds up the first half of C, the other the second: half of the shuffles, and the dim
    of lanes is afterwards the one of halves.
    """
    NUM: gl.constexpr = b_x.shape[2] // 2
    b_x = b_x.reshape([b_x.shape[0], b_x.shape[1], 2, NUM, b_x.shape[3]]).permute((0, 1, 3, 4, 2))
    b_low, b_high = gl.split(b_x)
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 lane, kept, given;
        .reg .pred p;
        mov.u32 lane, %laneid;
        and.b32 lane, lane, """ + LANE + """;
        setp.ne.b32 p, lane, 0;
        selp.b32 kept, $2, $1, p;
        selp.b32 given, $1, $2, p;
        shfl.sync.bfly.b32 given, given, """ + LANE + """, 31, -1;
        add.f32 $0, kept, given;
        }""",
        constraints="=r,r,r", args=[b_low, b_high], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def sum_lanes(b_x, R: gl.constexpr, C: gl.constexpr):
    """[R // 16, C]: sums over the second dim of x [R // 16, 8, C].

    Eight lanes of a warp hold what is added up for a column. Instead of adding up all columns in
    all lanes, each step gives half of the columns away to the lane that adds them: 14 shuffles
    instead of 48.
    """
    b_x = b_x.reshape([R // 16, 8, 8, C // 8])
    b_x = _share_with_lane(b_x, "16")
    b_x = _share_with_lane(b_x, "8")
    b_x = _share_with_lane(b_x, "4")
    return b_x.reshape([R // 16, C])


@gluon.jit
def tokens_of(p_line, start, stop, i, num_chunks, REVERSE: gl.constexpr, C: gl.constexpr):
    """[C] each: rows of the i-th chunk in time order, which of them are the segment's and, backward
    in time, q·dq of these."""
    o_row = start + (num_chunks - 1 - i if REVERSE else i) * C
    o_row += gl.arange(0, C, IN_WARP)
    m_row = (o_row >= start) & (o_row < stop)
    b_from_q = gl.zeros([C], gl.float32, IN_WARP)
    if REVERSE:
        b_from_q = gl.load(p_line + o_row, mask=m_row, other=0.0, cache_modifier=".cg")
    return o_row, m_row, b_from_q


@gluon.jit
def summed(s_sums, stage):
    """[C]: u·w of the chunk in a stage, from what eight warps have added up."""
    LINES_IN_WARP: gl.constexpr = gl.BlockedLayout([4, 2], [1, 32], [1, 1], [1, 0])
    b_sums = s_sums.index(stage * 2).load(LINES_IN_WARP)
    b_sums += s_sums.index(stage * 2 + 1).load(LINES_IN_WARP)
    return gl.convert_layout(gl.sum(b_sums, 0), IN_WARP, assert_trivial=True)


@gluon.jit
def _sums_from_end(b_x, b_behind):
    """[C] in IN_WARP: the sum from each token to the last and `behind`; and the first one again.

    Two tokens a lane. Triton's own scan takes four times as many shuffles.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 sum, next;
        .reg .pred p;
        add.f32 sum, $4, $5;
        shfl.sync.down.b32 next|p, sum, 1, 31, -1;
        @p add.f32 sum, sum, next;
        shfl.sync.down.b32 next|p, sum, 2, 31, -1;
        @p add.f32 sum, sum, next;
        shfl.sync.down.b32 next|p, sum, 4, 31, -1;
        @p add.f32 sum, sum, next;
        shfl.sync.down.b32 next|p, sum, 8, 31, -1;
        @p add.f32 sum, sum, next;
        shfl.sync.down.b32 next|p, sum, 16, 31, -1;
        @p add.f32 sum, sum, next;
        add.f32 sum, sum, $6;
        shfl.sync.down.b32 next|p, sum, 1, 31, -1;
        @!p mov.b32 next, $6;
        mov.b32 $0, sum;
        add.f32 $1, $5, next;
        shfl.sync.idx.b32 $2, sum, 0, 31, -1;
        mov.b32 $3, $2;
        }""",
        constraints="=&r,=&r,=&r,=&r,r,r,r,r", args=[b_x, b_behind],
        dtype=(gl.float32, gl.float32), is_pure=False, pack=2,
    )  # fmt: skip


@gluon.jit
def give_sums(b_sums, s_crossing, p_line, p_grad, tokens, b_behind, H, REVERSE: gl.constexpr):
    """Store u·w of a chunk or, backward in time, the decays' gradient.

    `behind` and what is returned are q·dq - k·dk, summed over the chunks behind, then with this.
    """
    o_row, m_row, b_from_q = tokens
    if REVERSE:
        b_dreach = gl.where(m_row, b_from_q - b_sums, 0.0)
        b_grad, b_behind = _sums_from_end(b_dreach, b_behind)
        b_grad += s_crossing.index(0).load(IN_WARP) + s_crossing.index(1).load(IN_WARP)
        gl.store(p_grad + o_row.to(gl.int64) * H, b_grad, mask=m_row)
    else:
        gl.store(p_line + o_row, b_sums, mask=m_row)
    return b_behind
