# ruff: noqa: SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"

"""The output pass by hand in two groups of warps that do not wait for each other.

It computes what `output_pass_kernel` does (see there for roles, legend and formulas), for bfloat16
and head dims of 128, without the sums for the decays' gradient. A group has four warps and half of
the state's rows, which are columns of z and w: what one group's matrix products leave idle, the
other's arithmetic fills. Each makes all of P for itself. A warp of its own fetches chunks and works
out their decays.

One chunk of a group: the entry product and P are issued; meanwhile the decays of P are worked out.
P goes through shared memory; then zᵀ P and the state's update are issued, z being decayed beside
the first; wᵀ leaves through shared memory, in one bulk copy, while the update runs. The decays of
P are worked out once where they are fixed.

EARLY: the first chunks are fetched before the wait for the launches before (overlap.py), which is
for the states alone. Only where every launch that may still run is of the same call and writes none
of x, y and z. LATE: the wait is at the end. Only where the launch before is another pass from the
same states.
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
    fixed_pair_decays,
    head_decay,
    last_decay,
    load_tile,
    room_for_parts,
    segment_of,
    state_entering,
    store_parts,
    stored_pair_decays,
    times_parts,
    token_decays,
    write_columns,
)
from seqpar.kernels.overlap import (
    begin_beside,
    end_after_launches_before,
    wait_for_launches_before,
)

__all__ = ["output_pass_groups_kernel"]


@gluon.jit
def _shared_memory(dtype: gl.constexpr, STAGES: gl.constexpr, C: gl.constexpr, D: gl.constexpr):
    """Room for the chunks in flight of x, y and z, for P, w and the decays; and barriers.

    z, P and w are apart for each group.
    """
    s_x = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_y = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_z = gl.allocate_shared_memory(dtype, [STAGES * 2, C, D // 2], TILE)
    s_P = gl.allocate_shared_memory(dtype, [2, C, C], TILE)
    s_w = gl.allocate_shared_memory(dtype, [2, C, D // 2], TILE)
    s_reach = gl.allocate_shared_memory(gl.float32, [STAGES, C], LINE)
    s_factor = gl.allocate_shared_memory(gl.float32, [STAGES, C], LINE)
    s_parts = room_for_parts(dtype, STAGES, C)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    barrier()
    return (s_x, s_y, s_z), (s_reach, s_factor, s_parts), (s_P, s_w), (full, empty)


@gluon.jit
def _fetch(
    windows, tiles, lines, bars, segment, p_decay, p_head, i_h,
    DECAY: gl.constexpr, REVERSE: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Start the copies of the chunks in time order, each as soon as both groups left its room."""
    TOKENS: gl.constexpr = gl.BlockedLayout([2], [32], [1], [0])
    d_x, d_y, d_z = windows
    s_x, s_y, s_z = tiles
    s_reach, s_factor, s_parts = lines
    full, empty = bars
    i_m, start, stop = segment[0], segment[1], segment[2]
    num_chunks = (stop - start + C - 1) // C
    first_slot = start // C + i_m
    column = i_h * D
    log2_decay = head_decay(p_decay, i_h, DECAY)
    o_line = gl.arange(0, C, TOKENS)
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
        s_factor.index(stage).store(ahead if REVERSE else back)
        store_parts(s_parts, stage, back if REVERSE else ahead, d_x.dtype)
        barrier()
        mbarrier.expect(bar, 3 * C * D * 2)
        load_tile(d_y, [row, column], bar, s_y.index(stage))
        load_tile(d_x, [row, column], bar, s_x.index(stage))
        load_tile(d_z, [row, column], bar, s_z.index(stage * 2))
        load_tile(d_z, [row, column + D // 2], bar, s_z.index(stage * 2 + 1))
        next_c = gl.maximum(i_c - 1, 0) if REVERSE else gl.minimum(i_c + 1, num_chunks - 1)
        left = gl.minimum(stop - start - next_c * C, C)
        slot = first_slot + next_c
        reach, back, ahead = token_decays(p_head, slot, left, log2_decay, o_line, DECAY, C)


@gluon.jit
def _group(
    group, d_w, p_w, tiles, lines, own, bars, segment, p_decay, p_head, p_by_segment,
    p_states, p_initial, p_final, i_h, H, length, stride_x, stride_z,
    DECAY: gl.constexpr, REVERSE: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """One group's columns of w of one segment and head."""
    R: gl.constexpr = D // 2
    L_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    L_W: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C, 16])
    A_W: gl.constexpr = gl.DotOperandLayout(0, L_W, 2)
    A_S: gl.constexpr = gl.DotOperandLayout(0, L_S, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    wait_for_launches_before(EARLY)
    s_x, s_y, s_z = tiles
    s_reach, s_factor, s_parts = lines
    full, empty = bars
    s_P, s_w = own[0].index(group), own[1].index(group)
    i_m, start, stop, i_s, before, behind, begin, end = segment
    dtype: gl.constexpr = d_w.dtype
    num_chunks = (stop - start + C - 1) // C
    first_slot = start // C + i_m
    column = i_h * D + group * R

    log2_decay = head_decay(p_decay, i_h, DECAY)
    o_z = group * R + gl.arange(0, R, gl.SliceLayout(1, L_S))[:, None]
    o_x = gl.arange(0, D, gl.SliceLayout(0, L_S))[None, :]
    o_S = o_z * stride_z + o_x * stride_x
    o_sequence = (i_s * H + i_h).to(gl.int64) * (D * D)
    b_S = state_entering(
        p_states, p_initial, p_by_segment, i_m, i_h, behind if REVERSE else before,
        end - stop if REVERSE else start - begin, length, o_S, o_sequence, H, log2_decay,
        DECAY, REVERSE, SCAN, R, D, L_S,
    )  # fmt: skip

    i_c = num_chunks - 1 if REVERSE else 0
    left = gl.minimum(stop - start - i_c * C, C)
    last = last_decay(p_head, first_slot + i_c, left, log2_decay, DECAY, C)
    if DECAY != 2:
        b_gap = fixed_pair_decays(log2_decay, REVERSE, C, L_W)
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
        b_state = gl.convert_layout(b_S.to(dtype), A_W)
        mbarrier.wait(full.index(stage), (i // STAGES) & 1)
        if num_tokens < C:  # both groups clear y, with the same numbers
            clear_rows(b_y, num_tokens, ROWS)
            clear_rows(b_z, num_tokens, ROWS)
            fence_async_shared()
            barrier()

        b_w = warpgroup_mma(b_state, b_x.permute((1, 0)), b_w, use_acc=False, is_async=True)
        b_P = warpgroup_mma(b_y, b_x.permute((1, 0)), b_P, use_acc=False, is_async=True)
        if DECAY == 2:
            b_gap = stored_pair_decays(s_reach.index(stage), REVERSE, C, L_W)
        b_P, b_w = warpgroup_mma_wait(0, deps=[b_P, b_w])
        s_P.store((b_P * b_gap).to(dtype))
        tma.store_wait(0)
        fence_async_shared()
        barrier()

        b_near = warpgroup_mma(b_z.permute((1, 0)), s_P, b_near, use_acc=False, is_async=True)
        b_decayed = times_parts(b_z.permute((1, 0)).load(A_S), s_parts, stage, A_S)
        b_S = b_S * gl.exp2(last)
        b_S = warpgroup_mma(b_decayed, b_y, b_S, is_async=True)
        b_factor = s_factor.index(stage).load(gl.SliceLayout(0, L_W))[None, :]
        b_w = b_w * b_factor
        b_near = warpgroup_mma_wait(1, deps=[b_near])
        s_w.permute((1, 0)).store((b_w + b_near).to(dtype))
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


@gluon.jit(do_not_specialize=["length"])  # new with every batch
def output_pass_groups_kernel(
    d_x, d_y, d_z, d_w, p_w, p_decay, p_reach, stride_reach,
    p_by_segment, p_states, p_initial, p_final, p_table, H, length, stride_x, stride_z,
    OVERLAP: gl.constexpr, EARLY: gl.constexpr, LATE: gl.constexpr,
    DECAY: gl.constexpr, REVERSE: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, BX: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """w of every segment. Grid: (M * H,); the longest segments start first.

    Windows of x and y are [C, BX], of z and w one group's columns, [C, BX // 2].
    """
    i_h = gl.program_id(0) % H
    segment = segment_of(p_table, gl.program_id(0) // H)
    p_head = p_reach + i_h.to(gl.int64) * stride_reach if DECAY == 2 else p_decay
    tiles, lines, own, bars = _shared_memory(d_x.dtype, STAGES, C, BX)
    wait_for_launches_before(OVERLAP and not EARLY and not LATE)
    begin_beside(LATE)
    gl.warp_specialize(
        [
            (_group, (0, d_w, p_w, tiles, lines, own, bars, segment, p_decay, p_head, p_by_segment,
                      p_states, p_initial, p_final, i_h, H, length, stride_x, stride_z,
                      DECAY, REVERSE, SCAN, C, BX, STAGES, EARLY)),
            (_group, (1, d_w, p_w, tiles, lines, own, bars, segment, p_decay, p_head, p_by_segment,
                      p_states, p_initial, p_final, i_h, H, length, stride_x, stride_z,
                      DECAY, REVERSE, SCAN, C, BX, STAGES, EARLY)),
            (_fetch, ((d_x, d_y, d_z), tiles, lines, bars, segment, p_decay, p_head, i_h,
                      DECAY, REVERSE, C, BX, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
    end_after_launches_before(LATE)
