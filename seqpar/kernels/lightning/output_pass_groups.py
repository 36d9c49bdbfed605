# ruff: noqa: SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"

"""The output pass by hand in two groups of warps that do not wait for each other.

The same mathematics as output_pass_hopper.py, with the same arguments but for windows: those of z,
u and w are one group's columns, [C, D // 2]. A group has four warps and half of the state's rows
(columns of z): what one group's matrix products leave idle, the other's arithmetic fills. Each
makes all of P for itself. A warp of its own fetches chunks, and works out the decays.

Sums for the decays' gradient come in two parts, one for each group.
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
    clear_rows,
    half_state_entering,
    head_decay,
    last_decay,
    room_for_parts,
    split,
    store_parts,
    sum_lanes,
    times_parts,
    token_decays,
)
from seqpar.kernels.overlap import wait_for_launches_before

__all__ = ["output_pair_groups_kernel", "output_pass_groups_kernel"]

# Triton 3.6 and 3.9 name these differently.
_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global

_TILE = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
_LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _segment_of(p_table, index):
    """A row of `Segments.table`."""
    p_row = p_table + index * 8
    i_m, start, stop = gl.load(p_row), gl.load(p_row + 1), gl.load(p_row + 2)
    i_s, before, behind = gl.load(p_row + 3), gl.load(p_row + 4), gl.load(p_row + 5)
    return i_m, start, stop, i_s, before, behind, gl.load(p_row + 6), gl.load(p_row + 7)


@gluon.jit
def _pair_decays(s_reach, REVERSE: gl.constexpr, C: gl.constexpr, L_P: gl.constexpr):
    """[j, i]: the decay between tokens j and i of a chunk, 0 where j is not before i."""
    b_up = s_reach.load(gl.SliceLayout(1, L_P))[:, None]
    b_across = s_reach.load(gl.SliceLayout(0, L_P))[None, :]
    o_up = gl.arange(0, C, gl.SliceLayout(1, L_P))[:, None]
    o_across = gl.arange(0, C, gl.SliceLayout(0, L_P))[None, :]
    if REVERSE:
        b_gap = gl.where(o_up >= o_across, b_up - b_across, -float("inf"))
    else:
        b_gap = gl.where(o_up <= o_across, b_across - b_up, -float("inf"))
    return gl.exp2(b_gap)


@gluon.jit
def _copies(
    windows, tiles, lines, bars, where,
    DECAY: gl.constexpr, REVERSE: gl.constexpr, GRAD: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch the chunks in time order, each as soon as both groups have left its room."""
    LINE: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    d_x, d_y, d_z, d_u = windows
    p_decay, p_head, first_slot, start, stop, i_h = where
    s_x, s_y, s_z, s_u = tiles
    s_reach, s_factor, s_ahead, s_back = lines
    full, empty = bars
    dtype: gl.constexpr = d_x.dtype
    column = i_h * D
    num_chunks = (stop - start + C - 1) // C
    log2_decay = head_decay(p_decay, i_h, DECAY)
    o_line = gl.arange(0, C, LINE)
    i_c = num_chunks - 1 if REVERSE else 0
    left = gl.minimum(stop - start - i_c * C, C)
    reach, back, ahead = token_decays(p_head, first_slot + i_c, left, log2_decay, o_line, DECAY, C)
    for i in range(0, num_chunks):
        stage = i % STAGES
        i_c = num_chunks - 1 - i if REVERSE else i
        row = start + i_c * C
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), ((i // STAGES) & 1) ^ 1)
        s_reach.index(stage).store(reach)
        if REVERSE:
            s_factor.index(stage).store(ahead)
            store_parts(s_back, stage, back, dtype)
            if GRAD:
                store_parts(s_ahead, stage, ahead, dtype)
        else:
            s_factor.index(stage).store(back)
            store_parts(s_ahead, stage, ahead, dtype)
            if GRAD:
                store_parts(s_back, stage, back, dtype)
        _barrier()
        mbarrier.expect(bar, (4 if GRAD else 3) * C * D * 2)
        _load(d_y, [row, column], bar, s_y.index(stage))
        _load(d_x, [row, column], bar, s_x.index(stage))
        for group in gl.static_range(2):
            at = column + group * (D // 2)
            _load(d_z, [row, at], bar, s_z.index(stage * 2 + group))
            if GRAD:
                _load(d_u, [row, at], bar, s_u.index(stage * 2 + group))
        next_c = gl.maximum(i_c - 1, 0) if REVERSE else gl.minimum(i_c + 1, num_chunks - 1)
        left = gl.minimum(stop - start - next_c * C, C)
        reach, back, ahead = token_decays(
            p_head, first_slot + next_c, left, log2_decay, o_line, DECAY, C
        )


@gluon.jit
def _write(
    d_w, p_w, s_w, row, num_tokens, i_h, H, group,
    C: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Store a group's columns of w: in one bulk copy, or only the rows that are the segment's."""
    column = i_h * D + group * (D // 2)
    if num_tokens == C:
        _store(d_w, [row, column], s_w)
    else:
        o_r = gl.arange(0, C, gl.SliceLayout(1, ROWS))
        o_d = gl.arange(0, D // 2, gl.SliceLayout(0, ROWS))[None, :]
        p_out = p_w + (row + o_r).to(gl.int64)[:, None] * (H * D) + column + o_d
        gl.store(p_out, s_w.load(ROWS), mask=(o_r < num_tokens)[:, None])


@gluon.jit
def _group(
    group, buffers, pointers, p_head, segment, sizes,
    DECAY: gl.constexpr, REVERSE: gl.constexpr, GRAD: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ALIAS: gl.constexpr,
    ORDER: gl.constexpr,
):  # fmt: skip
    """One group's columns of w of one segment and head."""
    R: gl.constexpr = D // 2
    L_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    L_W: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    A_W: gl.constexpr = gl.DotOperandLayout(0, L_W, 2)
    A_S: gl.constexpr = gl.DotOperandLayout(0, L_S, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    COLUMNS: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0])
    d_w, tiles, s_P, s_w, lines, bars, turns = buffers
    i_h, H, N, M, length, stride_x, stride_z = sizes
    s_x, s_y, s_z, s_u = tiles
    s_reach, s_factor, s_ahead, s_back = lines
    full, empty = bars
    p_w, p_decay, p_by_segment, p_dots, p_crossing, p_exits, p_states, p_initial, p_final = pointers
    i_m, start, stop, i_s, before, behind, begin, end = segment
    dtype: gl.constexpr = d_w.dtype
    num_chunks = (stop - start + C - 1) // C
    s_P, s_w = s_P.index(group), s_w.index(group)

    log2_decay = head_decay(p_decay, i_h, DECAY)
    o_z = group * R + gl.arange(0, R, gl.SliceLayout(1, L_S))[:, None]
    o_x = gl.arange(0, D, gl.SliceLayout(0, L_S))[None, :]
    o_S = o_z * stride_z + o_x * stride_x
    o_sequence = (i_s * H + i_h).to(gl.int64) * (D * D)
    b_S = half_state_entering(
        p_states, p_initial, p_by_segment, i_m, i_h, behind if REVERSE else before,
        end - stop if REVERSE else start - begin, length, o_S, o_sequence, H, log2_decay,
        DECAY, REVERSE, SCAN, D, L_S,
    )  # fmt: skip
    o_exit = (i_m * H + i_h).to(gl.int64) * (D * D)
    if GRAD and REVERSE:
        if p_exits is not None:
            crossing = gl.sum(gl.sum(b_S * gl.load(p_exits + o_exit + o_S), 1), 0)
            gl.store(p_crossing + (group * M + i_m) * H + i_h, crossing)

    first_slot = start // C + i_m
    i_c = num_chunks - 1 if REVERSE else 0
    left = gl.minimum(stop - start - i_c * C, C)
    last = last_decay(p_head, first_slot + i_c, left, log2_decay, DECAY, C)
    for i in range(0, num_chunks):
        stage = i % STAGES
        i_c = num_chunks - 1 - i if REVERSE else i
        row = start + i_c * C
        num_tokens = gl.minimum(stop - row, C)
        next_c = gl.maximum(i_c - 1, 0) if REVERSE else gl.minimum(i_c + 1, num_chunks - 1)
        left = gl.minimum(stop - start - next_c * C, C)
        next_last = last_decay(p_head, first_slot + next_c, left, log2_decay, DECAY, C)
        b_x, b_y, b_z = s_x.index(stage), s_y.index(stage), s_z.index(stage * 2 + group)
        b_w = gl.zeros([R, C], gl.float32, L_W)
        b_P = gl.zeros([C, C], gl.float32, L_W)
        b_near = gl.zeros([R, C], gl.float32, L_W)
        if GRAD:
            b_front, b_rest = split(gl.convert_layout(b_S, A_W), dtype)
        else:
            b_front = gl.convert_layout(b_S.to(dtype), A_W)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        if num_tokens < C:  # both groups clear y, with the same numbers
            clear_rows(b_y, num_tokens, ROWS)
            clear_rows(b_z, num_tokens, ROWS)
            fence_async_shared()
            _barrier()
        if ORDER:
            mbarrier.wait(turns.index(group), (i & 1) ^ 1 ^ group)

        b_w = warpgroup_mma(b_front, b_x.permute((1, 0)), b_w, use_acc=False, is_async=True)
        if GRAD:
            b_w = warpgroup_mma(b_rest, b_x.permute((1, 0)), b_w, is_async=True)
        b_P = warpgroup_mma(b_y, b_x.permute((1, 0)), b_P, use_acc=False, is_async=True)
        b_gap = _pair_decays(s_reach.index(stage), REVERSE, C, L_W)
        b_P, b_w = warpgroup_mma_wait(0, deps=[b_P, b_w])
        if ALIAS:
            tma.store_wait(0)
            _barrier()
        s_P.store((b_P * b_gap).to(dtype))
        if not ALIAS:
            tma.store_wait(0)
        fence_async_shared()
        _barrier()

        b_near = warpgroup_mma(
            b_z.permute((1, 0)), s_P, b_near, use_acc=False, is_async=True
        )  # fmt: skip
        s_parts = s_back if REVERSE else s_ahead
        b_decayed = times_parts(b_z.permute((1, 0)).load(A_S), s_parts, stage, A_S)
        b_S = b_S * gl.exp2(last)
        b_S = warpgroup_mma(b_decayed, b_y, b_S, is_async=True)
        if ORDER:
            mbarrier.arrive(turns.index(1 - group), count=1)
        b_factor = s_factor.index(stage).load(gl.SliceLayout(0, L_W))[None, :]
        if GRAD:
            # The other pass adds u, decayed and rounded, to its state: so it counts here as well.
            b_u = s_u.index(stage * 2 + group).permute((1, 0)).load(L_W)
            b_far = times_parts(b_u, s_ahead if REVERSE else s_back, stage, L_W)
            b_dots = b_w * b_far.to(gl.float32)
        b_w = b_w * b_factor
        b_near = warpgroup_mma_wait(1, deps=[b_near])
        if ALIAS:
            _barrier()
        s_w.permute((1, 0)).store((b_w + b_near).to(dtype))
        if GRAD:
            b_dots = gl.fma(b_near, b_u.to(gl.float32), b_dots)
            b_dots = gl.sum(b_dots.reshape([R // 16, 2, 8, C]), 1)
            b_dots = gl.sum(gl.convert_layout(sum_lanes(b_dots, R, C), COLUMNS), 0)
        b_S = warpgroup_mma_wait(0, deps=[b_S])
        fence_async_shared()
        _barrier()
        mbarrier.arrive(empty.index(stage), count=1)
        _write(d_w, p_w, s_w, row, num_tokens, i_h, H, group, C, D, ROWS)
        if GRAD:
            o_dots = gl.arange(0, C, gl.SliceLayout(0, COLUMNS))
            p_line = p_dots + (group * H + i_h).to(gl.int64) * N + row + o_dots
            gl.store(p_line, b_dots, mask=o_dots < num_tokens)
        last = next_last

    tma.store_wait(0)
    if p_final is not None:
        if (before if REVERSE else behind) == 0:
            gl.store(p_final + o_sequence + o_S, b_S)
    if GRAD and not REVERSE:
        if p_exits is not None:
            gl.store(p_exits + o_exit + o_S, b_S)


@gluon.jit
def _shared_memory(
    dtype: gl.constexpr, GRAD: gl.constexpr, STAGES: gl.constexpr, ALIAS: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Room for the chunks in flight of x, y, z and u, for P, w and the decays; and barriers."""
    s_x = gl.allocate_shared_memory(dtype, [STAGES, C, D], _TILE)
    s_y = gl.allocate_shared_memory(dtype, [STAGES, C, D], _TILE)
    s_z = gl.allocate_shared_memory(dtype, [STAGES * 2, C, D // 2], _TILE)
    s_u = s_z
    if GRAD:
        s_u = gl.allocate_shared_memory(dtype, [STAGES * 2, C, D // 2], _TILE)
    s_P = gl.allocate_shared_memory(dtype, [2, C, C], _TILE)
    s_w = s_P
    if not ALIAS:
        s_w = gl.allocate_shared_memory(dtype, [2, C, D // 2], _TILE)
    s_reach = gl.allocate_shared_memory(gl.float32, [STAGES, C], _LINE)
    s_factor = gl.allocate_shared_memory(gl.float32, [STAGES, C], _LINE)
    s_ahead = room_for_parts(dtype, STAGES, C)
    s_back = s_ahead
    if GRAD:
        s_back = room_for_parts(dtype, STAGES, C)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turns = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()
    _barrier()
    tiles, lines = (s_x, s_y, s_z, s_u), (s_reach, s_factor, s_ahead, s_back)
    return tiles, s_P, s_w, lines, (full, empty), turns


@gluon.jit
def _run_segment(
    d_x, d_y, d_z, d_u, d_w, p_w, p_decay, p_reach, stride_reach, p_by_segment,
    p_dots, p_crossing, p_exits, p_states, p_initial, p_final,
    segment, shared, i_h, H, N, M, length, stride_x, stride_z,
    DECAY: gl.constexpr, REVERSE: gl.constexpr, GRAD: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ALIAS: gl.constexpr,
    ORDER: gl.constexpr,
):  # fmt: skip
    """w of one segment and head."""
    tiles, s_P, s_w, lines, bars, turns = shared
    i_m, start, stop = segment[0], segment[1], segment[2]
    p_head = p_reach + i_h.to(gl.int64) * stride_reach if DECAY == 2 else p_decay
    pointers = (
        p_w, p_decay, p_by_segment, p_dots, p_crossing, p_exits, p_states, p_initial, p_final,
    )  # fmt: skip
    buffers = (d_w, tiles, s_P, s_w, lines, bars, turns)
    sizes = (i_h, H, N, M, length, stride_x, stride_z)
    windows = (d_x, d_y, d_z, d_u)
    where = (p_decay, p_head, start // C + i_m, start, stop, i_h)
    gl.warp_specialize(
        [
            (_group, (0, buffers, pointers, p_head, segment, sizes,
                      DECAY, REVERSE, GRAD, SCAN, C, D, STAGES, ALIAS, ORDER)),
            (_group, (1, buffers, pointers, p_head, segment, sizes,
                      DECAY, REVERSE, GRAD, SCAN, C, D, STAGES, ALIAS, ORDER)),
            (_copies, (windows, tiles, lines, bars, where, DECAY, REVERSE, GRAD, C, D, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip


@gluon.jit(do_not_specialize=["N", "M", "length"])  # new with every batch
def output_pass_groups_kernel(
    d_x, d_y, d_z, d_u, d_w, p_w, p_decay, d_reach, p_reach, stride_reach,
    p_by_segment, p_dots, p_crossing, p_exits, p_states, p_initial,
    p_final, p_table, H, N, M, length, stride_x, stride_z, OVERLAP: gl.constexpr,
    DECAY: gl.constexpr, REVERSE: gl.constexpr, GRAD: gl.constexpr,
    SCAN: gl.constexpr, C: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, ALIAS: gl.constexpr, ORDER: gl.constexpr,
):  # fmt: skip
    """w of every segment. Grid: (M * H,); the longest segments start first."""
    i_h = gl.program_id(0) % H
    segment = _segment_of(p_table, gl.program_id(0) // H)
    shared = _shared_memory(d_x.dtype, GRAD, STAGES, ALIAS, C, D)
    wait_for_launches_before(OVERLAP)
    _run_segment(
        d_x, d_y, d_z, d_u, d_w, p_w, p_decay, p_reach, stride_reach, p_by_segment,
        p_dots, p_crossing, p_exits, p_states, p_initial, p_final,
        segment, shared, i_h, H, N, M, length, stride_x, stride_z,
        DECAY, REVERSE, GRAD, SCAN, C, D, STAGES, ALIAS, ORDER,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["N", "M", "length"])  # new with every batch
def output_pair_groups_kernel(
    d_q, d_k, d_v, d_do, d_half_q, d_half_do, d_half_k, d_dk, d_dv, p_dk, p_dv,
    p_decay, p_reach, stride_reach, p_by_segment, p_dots, p_crossing, p_exits,
    p_states, p_initial, p_final, p_table, H, N, M, length,
    OVERLAP: gl.constexpr, DECAY: gl.constexpr, GRAD: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, ALIAS: gl.constexpr,
    ORDER: gl.constexpr,
):  # fmt: skip
    """dk and dv of every segment, by neighbouring programs. Grid: (M * H * 2,)."""
    i_role, i_h = gl.program_id(0) % 2, gl.program_id(0) // 2 % H
    segment = _segment_of(p_table, gl.program_id(0) // 2 // H)
    shared = _shared_memory(d_q.dtype, GRAD, STAGES, ALIAS, C, D)
    wait_for_launches_before(OVERLAP)
    if i_role == 0:
        _run_segment(
            d_v, d_do, d_half_q, d_half_k, d_dk, p_dk, p_decay, p_reach, stride_reach,
            p_by_segment, p_dots, p_crossing, p_exits, p_states, p_initial, None,
            segment, shared, i_h, H, N, M, length, 1, D,
            DECAY, True, GRAD, SCAN, C, D, STAGES, ALIAS, ORDER,
        )  # fmt: skip
    else:
        _run_segment(
            d_k, d_q, d_half_do, None, d_dv, p_dv, p_decay, p_reach, stride_reach,
            p_by_segment, None, None, None, p_states, p_initial, p_final,
            segment, shared, i_h, H, N, M, length, D, 1,
            DECAY, True, False, SCAN, C, D, STAGES, ALIAS, ORDER,
        )  # fmt: skip
