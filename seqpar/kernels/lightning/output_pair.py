# ruff: noqa: SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call, attr-defined"

"""dk and dv in one launch by hand, for Hopper's matrix units: bfloat16, head dims of 128.

Each program makes one of them as `output_pass_kernel` does (see there for roles, legend and
formulas). Neighbouring programs read the same four tensors in step, so that one of them finds them
in the level-2 cache. Floor: 6 tensors instead of 8.

One chunk: P and the entry product are issued; meanwhile the decays of P are worked out, and z is
decayed for the state's update. P goes through shared memory; then zᵀ P and the update are issued,
and wᵀ leaves through shared memory, in one bulk copy, while the update runs. A chunk needs two
barriers: P is written; everything of the chunk is read and wᵀ written. A fixed decay's powers are
worked out once.
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
    write_rows,
)
from seqpar.kernels.overlap import wait_for_launches_before

__all__ = ["output_pair_kernel"]


@gluon.jit
def _shared_memory(dtype: gl.constexpr, STAGES: gl.constexpr, C: gl.constexpr, D: gl.constexpr):
    """Room for the chunks in flight of x, y and z, for w, P and the decays; and barriers."""
    s_x = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_y = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_z = gl.allocate_shared_memory(dtype, [STAGES, C, D], TILE)
    s_w = gl.allocate_shared_memory(dtype, [C, D], TILE)
    s_P = gl.allocate_shared_memory(dtype, [C, C], TILE)
    s_reach = gl.allocate_shared_memory(gl.float32, [2, C], LINE)
    s_factor = gl.allocate_shared_memory(gl.float32, [2, C], LINE)
    s_parts = room_for_parts(dtype, 2, C)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()
    return s_x, s_y, s_z, s_w, s_P, s_reach, s_factor, s_parts, bars


@gluon.jit
def _fetch(
    d_x, d_y, d_z, s_x, s_y, s_z, bars, i, num_chunks, start, column,
    STAGES: gl.constexpr, C: gl.constexpr, D: gl.constexpr,
):  # fmt: skip
    """Start the copies of the i-th chunk in time order, if there is one."""
    stage = i % STAGES
    row = start + (num_chunks - 1 - i) * C
    bar = bars.index(stage)
    pred = i < num_chunks
    mbarrier.expect(bar, 3 * C * D * 2, pred=pred)
    load_tile(d_y, [row, column], bar, s_y.index(stage), pred=pred)
    load_tile(d_x, [row, column], bar, s_x.index(stage), pred=pred)
    load_tile(d_z, [row, column], bar, s_z.index(stage), pred=pred)


@gluon.jit
def _run_segment(
    d_x, d_y, d_z, d_w, p_w, p_decay, p_reach, stride_reach, p_by_segment,
    p_states, p_initial, p_final, segment, tiles, i_h, H, length, stride_x, stride_z,
    DECAY: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk or dv of one segment and head."""
    L_S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, D, 16])
    L_W: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [8, 1], [16, C, 16])
    L_P: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, C // 2, 16])
    A_W: gl.constexpr = gl.DotOperandLayout(0, L_W, 2)
    A_S: gl.constexpr = gl.DotOperandLayout(0, L_S, 2)
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    TOKENS: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    dtype: gl.constexpr = d_x.dtype
    i_m, start, stop, i_s, before, behind, _, end = segment
    s_x, s_y, s_z, s_w, s_P, s_reach, s_factor, s_parts, bars = tiles
    num_chunks = (stop - start + C - 1) // C
    for i in gl.static_range(STAGES):
        _fetch(
            d_x, d_y, d_z, s_x, s_y, s_z, bars, i, num_chunks, start, i_h * D,
            STAGES, C, D,
        )  # fmt: skip

    log2_decay = head_decay(p_decay, i_h, DECAY)
    p_head = p_reach
    if DECAY == 2:
        p_head = p_reach + i_h.to(gl.int64) * stride_reach
    o_z = gl.arange(0, D, gl.SliceLayout(1, L_S))[:, None]
    o_x = gl.arange(0, D, gl.SliceLayout(0, L_S))[None, :]
    o_S = o_z * stride_z + o_x * stride_x
    o_sequence = (i_s * H + i_h).to(gl.int64) * (D * D)
    b_S = state_entering(
        p_states, p_initial, p_by_segment, i_m, i_h, behind, end - stop, length, o_S, o_sequence,
        H, log2_decay, DECAY, True, SCAN, D, D, L_S,
    )  # fmt: skip

    o_line = gl.arange(0, C, TOKENS)
    first_slot = start // C + i_m
    i_c = num_chunks - 1
    left = gl.minimum(stop - start - i_c * C, C)
    reach, back, ahead = token_decays(p_head, first_slot + i_c, left, log2_decay, o_line, DECAY, C)
    s_reach.index(0).store(reach)
    s_factor.index(0).store(ahead)
    store_parts(s_parts, 0, back, dtype)
    if DECAY != 2:  # the first chunk in time order may be part-filled, all others are alike
        reach, back, ahead = token_decays(p_head, first_slot, C, log2_decay, o_line, DECAY, C)
        s_factor.index(1).store(ahead)
        store_parts(s_parts, 1, back, dtype)
        b_gap = fixed_pair_decays(log2_decay, True, C, L_P)
    last = last_decay(p_head, first_slot + i_c, left, log2_decay, DECAY, C)
    barrier()

    for i in range(0, num_chunks):
        stage = i % STAGES
        i_c = num_chunks - 1 - i
        row = start + i_c * C
        num_tokens = gl.minimum(stop - row, C)
        turn = i % 2 if DECAY == 2 else gl.minimum(i, 1)
        next_c = gl.maximum(i_c - 1, 0)
        left = gl.minimum(stop - start - next_c * C, C)
        slot = first_slot + next_c
        if DECAY == 2:
            reach, back, ahead = token_decays(p_head, slot, left, log2_decay, o_line, DECAY, C)
        next_last = last_decay(p_head, slot, left, log2_decay, DECAY, C)
        b_x, b_y, b_z = s_x.index(stage), s_y.index(stage), s_z.index(stage)
        mbarrier.wait(bars.index(stage), (i // STAGES) & 1)
        if num_tokens < C:
            clear_rows(b_y, num_tokens, ROWS)
            clear_rows(b_z, num_tokens, ROWS)
            fence_async_shared()
            barrier()

        b_P = gl.zeros([C, C], gl.float32, L_P)
        b_w = gl.zeros([D, C], gl.float32, L_W)
        b_state = gl.convert_layout(b_S.to(dtype), A_W)
        b_P = warpgroup_mma(b_y, b_x.permute((1, 0)), b_P, use_acc=False, is_async=True)
        b_w = warpgroup_mma(b_state, b_x.permute((1, 0)), b_w, use_acc=False, is_async=True)
        if DECAY == 2:
            b_gap = stored_pair_decays(s_reach.index(turn), True, C, L_P)
        b_P = warpgroup_mma_wait(1, deps=[b_P])
        s_P.store((b_P * b_gap).to(dtype))
        tma.store_wait(0)
        fence_async_shared()
        barrier()

        b_decayed = times_parts(b_z.permute((1, 0)).load(A_S), s_parts, turn, A_S)
        b_S = b_S * gl.exp2(last)
        b_w, b_S, b_decayed = warpgroup_mma_wait(0, deps=[b_w, b_S, b_decayed])
        b_factor = s_factor.index(turn).load(gl.SliceLayout(0, L_W))[None, :]
        b_w = warpgroup_mma(b_z.permute((1, 0)), s_P, b_w * b_factor, is_async=True)
        b_S = warpgroup_mma(b_decayed, b_y, b_S, is_async=True)

        b_w = warpgroup_mma_wait(1, deps=[b_w])
        s_w.permute((1, 0)).store(b_w.to(dtype))
        b_S = warpgroup_mma_wait(0, deps=[b_S])
        if DECAY == 2:
            s_reach.index(1 - turn).store(reach)
            s_factor.index(1 - turn).store(ahead)
            store_parts(s_parts, 1 - turn, back, dtype)
        fence_async_shared()
        barrier()
        write_rows(d_w, p_w, s_w, row, num_tokens, i_h, H, C, D, ROWS)
        _fetch(
            d_x, d_y, d_z, s_x, s_y, s_z, bars, i + STAGES, num_chunks, start, i_h * D,
            STAGES, C, D,
        )  # fmt: skip
        last = next_last

    tma.store_wait(0)
    if p_final is not None:
        if before == 0:
            gl.store(p_final + o_sequence + o_S, b_S)


@gluon.jit(do_not_specialize=["length"])  # new with every batch
def output_pair_kernel(
    d_q, d_k, d_v, d_do, d_dk, d_dv, p_dk, p_dv, p_decay, p_reach, stride_reach, p_by_segment,
    p_states, p_initial, p_final, p_table, H, length,
    OVERLAP: gl.constexpr, DECAY: gl.constexpr, SCAN: gl.constexpr,
    C: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk and dv of every segment, by neighbouring programs. Grid: (M * H * 2,)."""
    i_role, i_h = gl.program_id(0) % 2, gl.program_id(0) // 2 % H
    segment = segment_of(p_table, gl.program_id(0) // 2 // H)
    tiles = _shared_memory(d_q.dtype, STAGES, C, D)
    wait_for_launches_before(OVERLAP)
    if i_role == 0:
        _run_segment(
            d_v, d_do, d_q, d_dk, p_dk, p_decay, p_reach, stride_reach, p_by_segment,
            p_states, p_initial, None,
            segment, tiles, i_h, H, length, 1, D, DECAY, SCAN, C, D, STAGES,
        )  # fmt: skip
    else:
        _run_segment(
            d_k, d_q, d_do, d_dv, p_dv, p_decay, p_reach, stride_reach, p_by_segment,
            p_states, p_initial, p_final,
            segment, tiles, i_h, H, length, D, 1, DECAY, SCAN, C, D, STAGES,
        )  # fmt: skip
