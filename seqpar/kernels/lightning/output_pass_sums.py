# ruff: noqa: SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"

"""The output pass by hand that takes sums for the gradient of decays per token along.

It computes what `output_pass_kernel` does (see there for roles, legend and formulas), for bfloat16
and head dims of 128: w, which is dq or dk, and u·w of each token, u being q or k. One group of
eight warps works on a chunk; a warp of its own fetches chunks and works out their decays.

One chunk: P and the entry product are issued; meanwhile the decays of P are worked out, and z is
decayed for the state's update. P goes through shared memory; then zᵀ P and the update are issued,
and wᵀ leaves through shared memory, in one bulk copy, while the update runs. The entry product's
part of the sums is taken before zᵀ P is issued, the rest beside the update. A chunk needs two
barriers: P is written; everything of the chunk is read and wᵀ written.
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
    TILE,
    barrier,
    clear_rows,
    last_decay,
    load_tile,
    room_for_parts,
    segment_of,
    split,
    state_entering,
    store_parts,
    stored_pair_decays,
    sum_lanes,
    times_parts,
    token_decays,
    write_rows,
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
    """Room for the chunks in flight of x, y, z and u, for P, w and the decays; and barriers."""
    s_x = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_y = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_z = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_u = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_P = gl.allocate_shared_memory(dtype, [C, C], TILE)
    s_w = gl.allocate_shared_memory(dtype, [C, D], TILE)
    s_reach = gl.allocate_shared_memory(gl.float32, [STAGES, C], LINE)
    s_factor = gl.allocate_shared_memory(gl.float32, [STAGES, C], LINE)
    s_back = room_for_parts(dtype, STAGES, C)
    s_ahead = room_for_parts(dtype, STAGES, C)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    barrier()
    return (s_x, s_y, s_z, s_u), (s_reach, s_factor, s_back, s_ahead), (s_P, s_w), (full, empty)


@gluon.jit
def _fetch(
    windows, tiles, lines, bars, segment, p_head, i_h,
    REVERSE: gl.constexpr, C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of the chunks in time order, each as soon as its room is free."""
    TOKENS: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    d_x, d_y, d_z, d_u = windows
    s_x, s_y, s_z, s_u = tiles
    s_reach, s_factor, s_back, s_ahead = lines
    full, empty = bars
    i_m, start, stop = segment[0], segment[1], segment[2]
    num_chunks = (stop - start + C - 1) // C
    first_slot = start // C + i_m
    column = i_h * D
    o_line = gl.arange(0, C, TOKENS)
    i_c = num_chunks - 1 if REVERSE else 0
    left = gl.minimum(stop - start - i_c * C, C)
    reach, back, ahead = token_decays(p_head, first_slot + i_c, left, 0.0, o_line, PER_TOKEN, C)
    for i in range(0, num_chunks):
        stage = i % STAGES
        i_c = num_chunks - 1 - i if REVERSE else i
        row = start + i_c * C
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        s_reach.index(stage).store(reach)
        s_factor.index(stage).store(ahead if REVERSE else back)
        store_parts(s_back, stage, back, d_x.dtype)
        store_parts(s_ahead, stage, ahead, d_x.dtype)
        barrier()
        mbarrier.expect(bar, 4 * C * D * 2)
        load_tile(d_y, [row, column], bar, s_y.index(stage))
        load_tile(d_x, [row, column], bar, s_x.index(stage))
        load_tile(d_z, [row, column], bar, s_z.index(stage))
        load_tile(d_u, [row, column], bar, s_u.index(stage))
        next_c = gl.maximum(i_c - 1, 0) if REVERSE else gl.minimum(i_c + 1, num_chunks - 1)
        left = gl.minimum(stop - start - next_c * C, C)
        slot = first_slot + next_c
        reach, back, ahead = token_decays(p_head, slot, left, 0.0, o_line, PER_TOKEN, C)


@gluon.jit
def _group(
    d_w, p_w, tiles, lines, own, bars, segment, p_head, p_by_segment,
    p_dots, p_crossing, p_exits, p_states, p_initial, p_final,
    i_h, H, N, length, stride_x, stride_z,
    REVERSE: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """w and the sums of one segment and head."""
    L_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    L_W: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C, 16])
    L_P: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    A_W: gl.constexpr = gl.DotOperandLayout(0, L_W, 2)
    A_S: gl.constexpr = gl.DotOperandLayout(0, L_S, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    COLUMNS: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [1, 8], [1, 0])
    s_x, s_y, s_z, s_u = tiles
    s_reach, s_factor, s_back, s_ahead = lines
    full, empty = bars
    s_P, s_w = own
    i_m, start, stop, i_s, before, behind, begin, end = segment
    dtype: gl.constexpr = d_w.dtype
    num_chunks = (stop - start + C - 1) // C
    first_slot = start // C + i_m

    o_z = gl.arange(0, D, gl.SliceLayout(1, L_S))[:, None]
    o_x = gl.arange(0, D, gl.SliceLayout(0, L_S))[None, :]
    o_S = o_z * stride_z + o_x * stride_x
    o_sequence = (i_s * H + i_h).to(gl.int64) * (D * D)
    b_S = state_entering(
        p_states, p_initial, p_by_segment, i_m, i_h, behind if REVERSE else before,
        end - stop if REVERSE else start - begin, length, o_S, o_sequence, H, 0.0,
        PER_TOKEN, REVERSE, SCAN, D, D, L_S,
    )  # fmt: skip
    o_exit = (i_m * H + i_h).to(gl.int64) * (D * D)
    if REVERSE:
        if p_exits is not None:
            crossing = gl.sum(gl.sum(b_S * gl.load(p_exits + o_exit + o_S), 1), 0)
            gl.store(p_crossing + i_m * H + i_h, crossing)

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
        b_x, b_y, b_z = s_x.index(stage), s_y.index(stage), s_z.index(stage)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        if num_tokens < C:
            clear_rows(b_y, num_tokens, ROWS)
            clear_rows(b_z, num_tokens, ROWS)
            fence_async_shared()
            barrier()

        b_P = gl.zeros([C, C], gl.float32, L_P)
        b_w = gl.zeros([D, C], gl.float32, L_W)
        b_P = warpgroup_mma(b_y, b_x.permute((1, 0)), b_P, use_acc=False, is_async=True)
        b_front, b_rest = split(gl.convert_layout(b_S, A_W), dtype)
        b_w = warpgroup_mma(b_front, b_x.permute((1, 0)), b_w, use_acc=False, is_async=True)
        b_w = warpgroup_mma(b_rest, b_x.permute((1, 0)), b_w, is_async=True)
        b_gap = stored_pair_decays(s_reach.index(stage), REVERSE, C, L_P)
        b_P = warpgroup_mma_wait(2, deps=[b_P])
        s_P.store((b_P * b_gap).to(dtype))
        tma.store_wait(0)
        fence_async_shared()
        barrier()

        b_factor = s_factor.index(stage).load(gl.SliceLayout(0, L_W))[None, :]
        s_parts = s_back if REVERSE else s_ahead
        b_decayed = times_parts(b_z.permute((1, 0)).load(A_S), s_parts, stage, A_S)
        b_S = b_S * gl.exp2(last)
        b_w, b_S, b_decayed = warpgroup_mma_wait(0, deps=[b_w, b_S, b_decayed])
        # The other pass adds u, decayed and rounded, to its state: so it counts here as well.
        b_u = s_u.index(stage).permute((1, 0)).load(L_W)
        s_parts = s_ahead if REVERSE else s_back
        b_far = times_parts(b_u, s_parts, stage, L_W).to(gl.float32)
        b_u = b_u.to(gl.float32)
        b_more = b_w * (b_far - b_u * b_factor)
        b_dots = gl.sum(b_more.reshape([D // 16, 2, 8, C]), 1)
        b_w = warpgroup_mma(b_z.permute((1, 0)), s_P, b_w * b_factor, is_async=True)
        b_S = warpgroup_mma(b_decayed, b_y, b_S, is_async=True)

        b_w = warpgroup_mma_wait(1, deps=[b_w])
        s_w.permute((1, 0)).store(b_w.to(dtype))
        b_dots += gl.sum((b_w * b_u).reshape([D // 16, 2, 8, C]), 1)
        b_dots = gl.sum(gl.convert_layout(sum_lanes(b_dots, D, C), COLUMNS), 0)
        b_S = warpgroup_mma_wait(0, deps=[b_S])
        fence_async_shared()
        barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        write_rows(d_w, p_w, s_w, row, num_tokens, i_h, H, C, D, ROWS)
        o_dots = gl.arange(0, C, gl.SliceLayout(0, COLUMNS))
        p_line = p_dots + i_h.to(gl.int64) * N + row + o_dots
        gl.store(p_line, b_dots, mask=o_dots < num_tokens)
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
    p_by_segment, p_dots, p_crossing, p_exits, p_states, p_initial,
    p_final, p_table, H, N, length, stride_x, stride_z, OVERLAP: gl.constexpr, LATE: gl.constexpr,
    REVERSE: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, BX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """w and sums of every segment. Grid: (M * H,); the longest segments start first.

    LATE: it waits at its end (overlap.py), where the launch before is another pass from the same
    states.
    """
    i_h = gl.program_id(0) % H
    segment = segment_of(p_table, gl.program_id(0) // H)
    p_head = p_reach + i_h.to(gl.int64) * stride_reach
    tiles, lines, own, bars = _shared_memory(d_x.dtype, STAGES, C, BX)
    wait_for_launches_before(OVERLAP and not LATE)
    begin_beside(LATE)
    gl.warp_specialize(
        [
            (_group, (d_w, p_w, tiles, lines, own, bars, segment, p_head, p_by_segment,
                      p_dots, p_crossing, p_exits, p_states, p_initial, p_final,
                      i_h, H, N, length, stride_x, stride_z, REVERSE, SCAN, C, BX, STAGES)),
            (_fetch, ((d_x, d_y, d_z, d_u), tiles, lines, bars, segment, p_head, i_h,
                      REVERSE, C, BX, STAGES)),
        ],
        [1],
        [24],
    )  # fmt: skip
    end_after_launches_before(LATE)
