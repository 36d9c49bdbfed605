# ruff: noqa: SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"

"""The output pass by hand that takes sums for the gradient of decays per token along.

It computes what `output_pass_kernel` does (see there for roles and legend), for bfloat16 and head
dims of 128: w, which is dq or dk, and u·w of each token, u being q or k. Forward in time u·w, which
is q·dq, is stored; backward in time it is k·dk, which no one else needs: the pass reads q·dq and
stores the decays' gradient itself (decay_gradient.py has the formula), whose sums over the tokens
behind run in its own direction.

The device runs at its power limit here, so instructions count. All decays of a chunk are therefore
in P, x and y before the products that carry the state S,

    P = (y xᵀ) times the decays between tokens,    x' = x times the decays since the chunk began,
    wᵀ = S x'ᵀ + zᵀ P,    S = S times the chunk's decay + zᵀ y',    y' = y times those to its end

(began and end: in the pass's own direction). wᵀ is one accumulator, u·w one product, and z goes
into both products as it was read. x' and y' are rounded to bfloat16 once, and alike in both passes:
the x' of dq's is the y' of dk's and the other way round, so what one adds to its state is what the
other reads from its own, and the rounding leaves the decays' gradient when it is summed. S is
multiplied as the sum of two bfloat16 numbers.

Five groups of warps, of which the last two share the registers of four warps:

- two halves of four warps, each with half of S's rows, which are columns of z, u and w;
- four warps for P of a chunk, while the halves are at the chunk before;
- two that decay: x' and y' in the places of x and y;
- one that carries: copies, decays of chunks and sums. What four warps would all do alike, such as
  starting a copy or adding up along the tokens, costs fewer instructions in one.

Barriers, one of each stage but `pairs`; a chunk i passes them in this order:

- `full`: its tensors and decays are there.
- `read`: P's product has read x and y, which may become x' and y'.
- `ready_x`, `ready_y`: x' is there; y' is.
- `pairs`: P is there, in its only room: given after `empty` of chunk i - 1.
- `empty`: both halves have left the chunk and its sums lie in the stage. The group of P waits for
  it before it stores the next P, the carrying warp before it reads the sums and fetches chunk
  i + STAGES.

Floor: a pass reads x, y, z and u and writes w, 5 tensors; backward with the decays' gradient moves
14. In a segment's last chunk, if part of it is another segment's, y is cleared before P, z before
the halves use it. What x holds there is multiplied by finite decays and stays in the columns of w,
and in the sums, of tokens that are not stored.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from seqpar.kernels.lightning.hopper_steps import (
    LINE,
    LINES,
    TILE,
    barrier,
    clear_rows,
    decay_rows,
    front_of,
    last_decay,
    load_tile,
    rest_of,
    room_for_parts,
    segment_of,
    state_entering,
    store_parts,
    stored_pair_decays,
    token_decays,
    widened,
    write_columns,
)
from seqpar.kernels.lightning.hopper_sums import (
    IN_EACH_WARP,
    IN_WARP,
    give_sums,
    sum_lanes,
    summed,
    tokens_of,
)
from seqpar.kernels.overlap import (
    begin_beside,
    end_after_launches_before,
    wait_for_launches_before,
)

__all__ = ["output_pass_sums_kernel"]

PER_TOKEN = gl.constexpr(2)
"""The kind of decays that learn."""


@gluon.jit
def _shared_memory(dtype: gl.constexpr, STAGES: gl.constexpr, C: gl.constexpr, D: gl.constexpr):
    """Room for the chunks in flight of x, y, z and u, for P, w, sums and decays; and barriers.

    z, u, w and sums are apart for each half.
    """
    s_x = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_y = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_z = gl.allocate_shared_memory(dtype, [STAGES * 2, C, D // 2], TILE)
    s_u = gl.allocate_shared_memory(dtype, [STAGES * 2, C, D // 2], TILE)
    s_P = gl.allocate_shared_memory(dtype, [C, C], TILE)
    s_w = gl.allocate_shared_memory(dtype, [2, C, D // 2], TILE)
    s_sums = gl.allocate_shared_memory(gl.float32, [STAGES * 2, D // 32, C], LINES)
    s_crossing = gl.allocate_shared_memory(gl.float32, [2, C], LINE)
    s_reach = gl.allocate_shared_memory(gl.float32, [STAGES, C], LINE)
    s_back = room_for_parts(dtype, STAGES, C)
    s_ahead = room_for_parts(dtype, STAGES, C)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    read = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_x = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready_y = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    pairs = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(read.index(i), count=1)
        mbarrier.init(ready_x.index(i), count=1)
        mbarrier.init(ready_y.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(pairs, count=1)
    fence_async_shared()
    barrier()
    tiles, lines = (s_x, s_y, s_z, s_u), (s_reach, s_back, s_ahead)
    bars = full, read, ready_x, ready_y, pairs, empty
    return tiles, lines, s_P, (s_w, s_sums, s_crossing), bars


@gluon.jit
def _fetch(
    windows, tiles, lines, full, decays, i, num_chunks, start, column,
    REVERSE: gl.constexpr, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of the i-th chunk in time order, and store its decays, if there is one."""
    d_x, d_y, d_z, d_u = windows
    s_x, s_y, s_z, s_u = tiles
    s_reach, s_back, s_ahead = lines
    reach, back, ahead = decays
    stage = i % STAGES
    i_c = num_chunks - 1 - i if REVERSE else i
    row = start + i_c * C
    bar = full.index(stage)
    pred = i < num_chunks
    s_reach.index(stage).store(reach)
    store_parts(s_back, stage, back, d_x.dtype)
    store_parts(s_ahead, stage, ahead, d_x.dtype)
    barrier()
    mbarrier.expect(bar, 4 * C * D * 2, pred=pred)
    load_tile(d_y, [row, column], bar, s_y.index(stage), pred=pred)
    load_tile(d_x, [row, column], bar, s_x.index(stage), pred=pred)
    for half in gl.static_range(2):
        at = column + half * (D // 2)
        load_tile(d_z, [row, at], bar, s_z.index(stage * 2 + half), pred=pred)
        load_tile(d_u, [row, at], bar, s_u.index(stage * 2 + half), pred=pred)


@gluon.jit
def _decays(p_head, first_slot, i, num_chunks, REVERSE: gl.constexpr, C: gl.constexpr):
    """`token_decays` of the i-th chunk in time order, or of the last if there is none."""
    i_c = gl.minimum(i, num_chunks - 1)
    i_c = num_chunks - 1 - i_c if REVERSE else i_c
    o_c = gl.arange(0, C, IN_WARP)
    return token_decays(p_head, first_slot + i_c, C, 0.0, o_c, PER_TOKEN, C)


@gluon.jit
def _carry(
    windows, tiles, lines, own, bars, segment, p_head, p_line, p_grad, i_h, H,
    REVERSE: gl.constexpr, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies and decays of each chunk, and the sums of the one that was in its place."""
    full, _, _, _, _, empty = bars
    i_m, start, stop = segment[0], segment[1], segment[2]
    num_chunks = (stop - start + C - 1) // C
    first_slot = start // C + i_m
    b_behind = gl.zeros([C], gl.float32, IN_WARP)
    for i in range(0, num_chunks + STAGES):
        stage = i % STAGES
        left = i - STAGES
        tokens = tokens_of(p_line, start, stop, left, num_chunks, REVERSE, C)  # none if left < 0
        decays = _decays(p_head, first_slot, i, num_chunks, REVERSE, C)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        b_sums = summed(own[1], stage)
        _fetch(
            windows, tiles, lines, full, decays, i, num_chunks, start, i_h * D,
            REVERSE, C, D, STAGES,
        )  # fmt: skip
        b_behind = give_sums(b_sums, own[2], p_line, p_grad, tokens, b_behind, H, REVERSE)


@gluon.jit
def _decay(
    tiles, lines, bars, segment,
    REVERSE: gl.constexpr, C: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """x and y decayed in place, once P is made of them."""
    s_x, s_y = tiles[0], tiles[1]
    _, s_back, s_ahead = lines
    _, read, ready_x, ready_y, _, _ = bars
    num_chunks = (segment[2] - segment[1] + C - 1) // C
    for i in range(0, num_chunks):
        stage = i % STAGES
        mbarrier.wait(read.index(stage), (i // STAGES) & 1)
        decay_rows(s_x.index(stage), s_ahead if REVERSE else s_back, stage)
        fence_async_shared()
        barrier()
        mbarrier.arrive(ready_x.index(stage), count=1)
        decay_rows(s_y.index(stage), s_back if REVERSE else s_ahead, stage)
        fence_async_shared()
        barrier()
        mbarrier.arrive(ready_y.index(stage), count=1)


@gluon.jit
def _pairs(
    tiles, lines, s_P, bars, segment,
    REVERSE: gl.constexpr, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """P of every chunk, given as soon as both halves have left the one before."""
    L_P: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    s_x, s_y = tiles[0], tiles[1]
    s_reach = lines[0]
    full, read, _, _, pairs, empty = bars
    start, stop = segment[1], segment[2]
    num_chunks = (stop - start + C - 1) // C
    for i in range(0, num_chunks):
        stage = i % STAGES
        i_c = num_chunks - 1 - i if REVERSE else i
        num_tokens = gl.minimum(stop - start - i_c * C, C)
        b_x, b_y = s_x.index(stage), s_y.index(stage)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        if num_tokens < C:
            clear_rows(b_y, num_tokens, ROWS, 16)
            fence_async_shared()
            barrier()
        b_P = gl.zeros([C, C], gl.float32, L_P)
        b_P = warpgroup_mma(b_y, b_x.permute((1, 0)), b_P, use_acc=False, is_async=True)
        b_P = warpgroup_mma_wait(0, deps=[b_P])
        barrier()
        mbarrier.arrive(read.index(stage), count=1)  # before P's decays: x' and y' are waited for
        b_gap = stored_pair_decays(s_reach.index(stage), REVERSE, C, L_P)
        b_P = (b_P * b_gap).to(s_P.dtype)
        before = i + STAGES - 1  # the chunk before has the stage that this one will have
        mbarrier.wait(empty.index(before % STAGES), ((before // STAGES) & 1) ^ 1)
        s_P.store(b_P)
        fence_async_shared()
        barrier()
        mbarrier.arrive(pairs, count=1)


@gluon.jit
def _half(
    half, d_w, p_w, tiles, s_P, own, bars, segment, p_head, p_by_segment,
    p_exits, p_states, p_initial, p_final,
    i_h, H, length, stride_x, stride_z,
    REVERSE: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One half's columns of w, and its part of the sums, of one segment and head."""
    R: gl.constexpr = D // 2
    L_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    L_W: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    A_W: gl.constexpr = gl.DotOperandLayout(0, L_W, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    s_x, s_y, s_z, s_u = tiles
    full, _, ready_x, ready_y, pairs, empty = bars
    s_w, s_sums = own[0].index(half), own[1]
    i_m, start, stop, i_s, before, behind, begin, end = segment
    dtype: gl.constexpr = d_w.dtype
    num_chunks = (stop - start + C - 1) // C
    first_slot = start // C + i_m
    column = i_h * D + half * R

    o_z = half * R + gl.arange(0, R, gl.SliceLayout(1, L_S))[:, None]
    o_x = gl.arange(0, D, gl.SliceLayout(0, L_S))[None, :]
    o_S = o_z * stride_z + o_x * stride_x
    o_sequence = (i_s * H + i_h).to(gl.int64) * (D * D)
    b_S = state_entering(
        p_states, p_initial, p_by_segment, i_m, i_h, behind if REVERSE else before,
        end - stop if REVERSE else start - begin, length, o_S, o_sequence, H, 0.0,
        PER_TOKEN, REVERSE, SCAN, R, D, L_S,
    )  # fmt: skip
    o_exit = (i_m * H + i_h).to(gl.int64) * (D * D)
    if REVERSE:
        crossing = 0.0
        if p_exits is not None:
            crossing = gl.sum(gl.sum(b_S * gl.load(p_exits + o_exit + o_S), 1), 0)
        b_crossing = gl.full([C], crossing, gl.float32, IN_EACH_WARP)
        own[2].index(half).store(b_crossing)  # read after this half has left its first chunk

    i_c = num_chunks - 1 if REVERSE else 0
    left = gl.minimum(stop - start - i_c * C, C)
    last = last_decay(p_head, first_slot + i_c, left, 0.0, PER_TOKEN, C)
    for i in range(0, num_chunks):
        stage = i % STAGES
        i_c = num_chunks - 1 - i if REVERSE else i
        row = start + i_c * C
        num_tokens = gl.minimum(stop - row, C)
        next_c = gl.maximum(i_c - 1, 0) if REVERSE else gl.minimum(i_c + 1, num_chunks - 1)
        left = gl.minimum(stop - start - next_c * C, C)
        next_last = last_decay(p_head, first_slot + next_c, left, 0.0, PER_TOKEN, C)
        b_x, b_y, b_z = s_x.index(stage), s_y.index(stage), s_z.index(stage * 2 + half)
        b_front = front_of(gl.convert_layout(b_S, A_W))
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        mbarrier.wait(ready_x.index(stage), (i // STAGES) & 1)
        if num_tokens < C:
            clear_rows(b_z, num_tokens, ROWS, 16)
            fence_async_shared()
            barrier()

        b_w = gl.zeros([R, C], gl.float32, L_W)
        b_w = warpgroup_mma(b_front, b_x.permute((1, 0)), b_w, use_acc=False, is_async=True)
        b_rest = rest_of(gl.convert_layout(b_S, A_W))
        b_w = warpgroup_mma(b_rest, b_x.permute((1, 0)), b_w, is_async=True)
        b_S = b_S * gl.exp2(last)
        tma.store_wait(0)
        barrier()
        mbarrier.wait(ready_y.index(stage), (i // STAGES) & 1)
        mbarrier.wait(pairs, i & 1)
        b_w = warpgroup_mma(b_z.permute((1, 0)), s_P, b_w, is_async=True)
        b_S = warpgroup_mma(b_z.permute((1, 0)), b_y, b_S, is_async=True)
        b_u = s_u.index(stage * 2 + half).permute((1, 0)).load(L_W)
        b_w = warpgroup_mma_wait(1, deps=[b_w])
        s_w.permute((1, 0)).store(b_w.to(dtype))
        b_dots = b_w * widened(b_u)
        b_dots = gl.sum(b_dots.reshape([R // 16, 2, 8, C]), 1)
        s_sums.index(stage * 2 + half).store(sum_lanes(b_dots, R, C))
        b_S = warpgroup_mma_wait(0, deps=[b_S])
        fence_async_shared()
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        write_columns(d_w, p_w, s_w, row, num_tokens, column, H, C, D, ROWS)
        last = next_last

    tma.store_wait(0)
    if p_final is not None:
        if (before if REVERSE else behind) == 0:
            gl.store(p_final + o_sequence + o_S, b_S)
    if not REVERSE:
        if p_exits is not None:
            gl.store(p_exits + o_exit + o_S, b_S)


@gluon.jit(do_not_specialize=["N", "length"])  # new with every batch
def output_pass_sums_kernel(
    d_x, d_y, d_z, d_u, d_w, p_w, p_reach, stride_reach,
    p_by_segment, p_dots, p_decay_grad, p_exits, p_states, p_initial,
    p_final, p_table, H, N, length, stride_x, stride_z,
    OVERLAP: gl.constexpr, LATE: gl.constexpr, REVERSE: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, BX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """w and sums of every segment. Grid: (M * H,); the longest segments start first.

    Windows of x and y are [C, BX], of z, u and w one half's columns, [C, BX // 2]. `dots` [H, N]
    is written forward in time and read backward in time, where `decay_grad` [N, H] is written.

    LATE: it waits at its end (overlap.py), where the launch before is another pass from the same
    states, which has waited for the pass that wrote what this one reads, `dots` and `exits`,
    before it let this one in.
    """
    i_h = gl.program_id(0) % H
    segment = segment_of(p_table, gl.program_id(0) // H)
    p_head = p_reach + i_h.to(gl.int64) * stride_reach
    p_grad = p_decay_grad + i_h if REVERSE else p_dots
    tiles, lines, s_P, own, bars = _shared_memory(d_x.dtype, STAGES, C, BX)
    wait_for_launches_before(OVERLAP and not LATE)
    begin_beside(LATE)
    gl.warp_specialize(
        [
            (_half, (0, d_w, p_w, tiles, s_P, own, bars, segment, p_head, p_by_segment,
                     p_exits, p_states, p_initial, p_final,
                     i_h, H, length, stride_x, stride_z, REVERSE, SCAN, C, BX, STAGES)),
            (_half, (1, d_w, p_w, tiles, s_P, own, bars, segment, p_head, p_by_segment,
                     p_exits, p_states, p_initial, p_final,
                     i_h, H, length, stride_x, stride_z, REVERSE, SCAN, C, BX, STAGES)),
            (_pairs, (tiles, lines, s_P, bars, segment, REVERSE, C, BX, STAGES)),
            (_decay, (tiles, lines, bars, segment, REVERSE, C, STAGES)),
            (_carry, ((d_x, d_y, d_z, d_u), tiles, lines, own, bars, segment, p_head,
                      p_dots + i_h.to(gl.int64) * N, p_grad, i_h, H, REVERSE, C, BX, STAGES)),
        ],
        [4, 4, 2, 1],
        [192, 72, 56, 56],
    )  # fmt: skip
    end_after_launches_before(LATE)
