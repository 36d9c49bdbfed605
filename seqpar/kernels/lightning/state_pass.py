"""States between segments: what each segment adds, and what enters each one.

Legend: M segments, S sequences, H heads, K key dim, V value dim, C tokens of a chunk, D a head
dim; `y` and `z` are the two inputs of an outer product, k and v or, backward in time, q and do.

    forward in time    U = sum_j exp(G_end - G_j)  y_jᵀ z_j        (k, v: adds to the state)
    backward in time   U = sum_i exp(G_i - G_begin) y_iᵀ z_i       (q, do: adds to its gradient)

with G the running sum of log decays. Under a fixed decay only tokens that are not decayed below
2^-32 are read: what lies further back is lost in float32 anyway.

Floor: what is read of y and z, once: at (1, 131072, 32, 128) three quarters of both without decay
(0.38 ms on an H200, takes 0.40), 0.02 ms where a state lasts for some hundred tokens.
"""

# ruff: noqa: SIM102
# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.launch import Launch, Window
from seqpar.kernels.lightning.decays import Decays, head_decay, load_last, load_row
from seqpar.kernels.lightning.plan import Cut
from seqpar.kernels.lightning.tuning import Config, padded
from seqpar.kernels.overlap import (
    begin_beside,
    can_overlap,
    end_after_launches_before,
    wait_for_launches_before,
)

__all__ = [
    "can_be_flat",
    "decayed",
    "enter_segments",
    "load_segment",
    "load_tile",
    "precision",
    "room_for_states",
    "segment_states",
]

REACH_BITS = tl.constexpr(32.0)


@triton.jit
def decayed(b_y, b_factor):
    """b_y [C, D] times b_factor [C], rounded once: half precision stays packed in registers.

    The factor is split into two parts of the dtype; a fused multiply-add rounds their sum.
    """
    if b_y.dtype == tl.float32:
        return b_y * b_factor[:, None]
    b_high = b_factor.to(b_y.dtype)
    b_low = (b_factor - b_high.to(tl.float32)).to(b_y.dtype)
    return tl.fma(b_y, tl.broadcast_to(b_high[:, None], b_y.shape), b_y * b_low[:, None])


@triton.jit
def load_tile(d_x, row, i_h, column, D, C: tl.constexpr, B: tl.constexpr, FLAT: tl.constexpr):
    """[C, B] of head i_h. Without the reshape, products take their left operand from shared memory
    and not through registers: FLAT wants heads side by side and D a power of two.
    """
    if FLAT:
        return d_x.load([row, i_h * D + column])
    else:
        return d_x.load([row, i_h, column]).reshape(C, B)


@triton.jit
def load_segment(p_table, index):
    """A row of `Segments.table`: loads that wait for no other, before anything else is known."""
    p_row = p_table + index * 8
    i_m, start, stop = tl.load(p_row), tl.load(p_row + 1), tl.load(p_row + 2)
    i_s, before, behind = tl.load(p_row + 3), tl.load(p_row + 4), tl.load(p_row + 5)
    return i_m, start, stop, i_s, before, behind, tl.load(p_row + 6), tl.load(p_row + 7)


@triton.jit
def _factors(d_reach, slot, num_tokens, distance, log2_decay, i_h,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, TAIL: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """[C]: how much of each token of a chunk is left at the segment's near end.

    `distance` is how much log2 decay lies between the chunk and that end.
    """
    o_c = tl.arange(0, C)
    if DECAY == 2:
        b_factor = load_row(d_reach, slot, 1 if REVERSE else 2, i_h, C) * tl.exp2(distance)
    else:
        b_steps = o_c + 1 if REVERSE else num_tokens - 1 - o_c
        b_factor = tl.exp2(distance + tl.maximum(b_steps, 0).to(tl.float32) * log2_decay)
    if TAIL:
        b_factor = tl.where(o_c < num_tokens, b_factor, 0.0)
    return b_factor


@triton.jit
def _add_tail(
    b_U, d_y, d_z, d_reach, row, slot, num_tokens, distance, log2_decay, i_h, i_v, K, V,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, FLAT: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U plus the last chunk of a segment, which has fewer than C tokens."""
    m_row = (tl.arange(0, C) < num_tokens)[:, None]
    b_y = load_tile(d_y, row, i_h, 0, K, C, BK, FLAT)
    b_z = load_tile(d_z, row, i_h, i_v * BV, V, C, BV, FLAT)
    b_factor = _factors(
        d_reach, slot, num_tokens, distance, log2_decay, i_h, DECAY, REVERSE, True, C
    )
    b_y = tl.where(m_row, b_y, 0.0).to(b_y.dtype)
    b_z = decayed(tl.where(m_row, b_z, 0.0).to(b_z.dtype), b_factor)
    return tl.dot(tl.trans(b_y), b_z, b_U, input_precision=PRECISION)


@triton.jit(do_not_specialize=["M"])  # the number of segments: new with every batch
def segment_states_kernel(
    d_y, d_z, p_decay, d_reach, p_reach, p_by_segment, p_states, p_table, M, H, K, V,
    stride_reach, OVERLAP: tl.constexpr, LATE: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, FLAT: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states[m] = U of segment m, for the listed segments.

    Grid: (listed segments * H, value tiles). Example, C = 2, fixed decay 1/2, three tokens with
    y = z = 1: U = 1/4 + 1/2 + 1 forward in time, 1/2 + 1/4 + 1/8 backward. LATE: it waits for the
    launches before at its end (overlap.py).
    """
    i_v, i_h = tl.program_id(1), tl.program_id(0) % H
    i_m, start, stop, _, _, _, _, _ = load_segment(p_table, tl.program_id(0) // H)
    wait_for_launches_before(OVERLAP and not LATE)
    begin_beside(LATE)
    num_full = (stop - start) // C
    row_tail = start + num_full * C
    first_slot = start // C + i_m
    log2_decay = head_decay(p_decay, i_h, DECAY)
    num_chunks = num_full
    if DECAY == 1:
        span = REACH_BITS / tl.maximum(-log2_decay, 1e-6)
        num_chunks = tl.minimum(num_full, (span / C).to(tl.int32) + 1)
    elif DECAY == 2:
        p_window = p_by_segment + ((2 if REVERSE else 1) * M + i_m) * H + i_h
        num_chunks = tl.minimum(num_full, tl.load(p_window).to(tl.int32))
    b_U = tl.zeros([BK, BV], tl.float32)
    distance = 0.0
    if not REVERSE:
        if row_tail < stop:
            b_U = _add_tail(
                b_U, d_y, d_z, d_reach, row_tail, first_slot + num_full, stop - row_tail, distance,
                log2_decay, i_h, i_v, K, V, DECAY, REVERSE, FLAT, C, BK, BV, PRECISION,
            )  # fmt: skip
            distance = (stop - row_tail) * log2_decay
            if DECAY == 2:
                distance = load_last(p_reach, first_slot + num_full, i_h, stride_reach, C, DECAY)
    for i in tl.range(0, num_chunks, num_stages=STAGES):
        i_c = i if REVERSE else num_full - 1 - i
        row = start + i_c * C
        last = C * log2_decay
        if DECAY == 2:
            last = load_last(p_reach, first_slot + i_c, i_h, stride_reach, C, DECAY)
        b_y = load_tile(d_y, row, i_h, 0, K, C, BK, FLAT)
        b_z = load_tile(d_z, row, i_h, i_v * BV, V, C, BV, FLAT)
        b_factor = _factors(
            d_reach, first_slot + i_c, C, distance, log2_decay, i_h, DECAY, REVERSE, False, C
        )
        # The decay goes to the right operand, which passes through shared memory again: a left
        # one would stay in registers, and its parts of the product would wait for each other.
        b_U = tl.dot(tl.trans(b_y), decayed(b_z, b_factor), b_U, input_precision=PRECISION)
        distance += last
    if REVERSE:
        if (row_tail < stop) & (num_chunks == num_full):
            b_U = _add_tail(
                b_U, d_y, d_z, d_reach, row_tail, first_slot + num_full, stop - row_tail, distance,
                log2_decay, i_h, i_v, K, V, DECAY, REVERSE, FLAT, C, BK, BV, PRECISION,
            )  # fmt: skip
    o_k = tl.arange(0, BK)[:, None]
    o_v = i_v * BV + tl.arange(0, BV)[None, :]
    p_U = p_states + (i_m * H + i_h).to(tl.int64) * K * V + o_k * V + o_v
    tl.store(p_U, b_U, mask=(o_k < K) & (o_v < V))
    end_after_launches_before(LATE)


@triton.jit
def enter_segments_kernel(
    p_states, p_entries, p_initial, p_final, p_decay, p_by_segment, p_bounds, p_first, H, KV, TILES,
    OVERLAP: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """entries[m] = the state that enters segment m when `initial`, or zero, enters its sequence.

    final[s] is what leaves the last segment (backward in time: the first). Either may be left out,
    and `entries` may be `states` itself. Grid: (S * H * tiles of K * V,).
    """
    i_state, i_tile = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_h, i_s = i_state % H, i_state // H
    o_kv = i_tile * BLOCK + tl.arange(0, BLOCK)
    m_kv = o_kv < KV
    first, end = tl.load(p_first + i_s), tl.load(p_first + i_s + 1)
    wait_for_launches_before(OVERLAP)
    o_sequence = (i_s * H + i_h).to(tl.int64) * KV + o_kv
    b_state = tl.zeros([BLOCK], tl.float32)
    if p_initial is not None:
        b_state += tl.load(p_initial + o_sequence, mask=m_kv, other=0.0)
    log2_decay = head_decay(p_decay, i_h, DECAY)
    for i in tl.range(0, end - first, num_stages=4):
        i_m = end - 1 - i if REVERSE else first + i
        o_m = (i_m * H + i_h).to(tl.int64) * KV
        need = m_kv
        if p_final is None:
            need = m_kv & (o_kv * 0 + i < end - first - 1)
        b_U = tl.load(p_states + o_m + o_kv, mask=need, other=0.0)
        if p_entries is not None:
            tl.store(p_entries + o_m + o_kv, b_state, mask=m_kv)
        if DECAY == 1:
            tokens = tl.load(p_bounds + i_m + 1) - tl.load(p_bounds + i_m)
            b_state = b_state * tl.exp2(tokens.to(tl.float32) * log2_decay)
        elif DECAY == 2:
            b_state = b_state * tl.exp2(tl.load(p_by_segment + i_m * H + i_h))
        b_state += b_U
    if p_final is not None:
        tl.store(p_final + o_sequence, b_state, mask=m_kv)


def precision(dtype: torch.dtype) -> str:
    """How the matrix units multiply: float32 inputs in three tf32 products, half as they are."""
    return "tf32x3" if dtype == torch.float32 else "tf32"


def can_be_flat(*tensors: Tensor) -> bool:
    """Whether each tensor's heads lie side by side and fill their tiles."""
    return all(x.stride(2) == x.shape[3] == padded(x.shape[3]) for x in tensors)


def room_for_states(y: Tensor, z: Tensor, cut: Cut) -> Tensor:
    """[M, H, K, V] float32, as it was found."""
    shape = (cut.segments.count, y.shape[2], y.shape[3], z.shape[3])
    return torch.empty(shape, dtype=torch.float32, device=y.device)


def segment_states(
    y: Tensor,
    z: Tensor,
    decays: Decays,
    cut: Cut,
    config: Config,
    *,
    reverse: bool,
    every: bool,
    room: Tensor | None = None,
    beside: bool = False,
) -> Tensor:
    """[M, H, K, V] float32: what each segment adds. Unless `every`, only where another needs it.

    `room`: memory for it. `beside`: the launch before has nothing in common with this one, and
    `room` was taken before it, so that both may run side by side.
    """
    states = room_for_states(y, z, cut) if room is None else room
    if not every and cut.segments.num_cut == 0:
        return states
    key = ("states", reverse, every, beside, y.stride(), z.stride())
    launch = cut.launches.get(key)
    if launch is None:
        launch = _states_launch(y, z, decays, cut, config, reverse, every, beside)
        cut.launches[key] = launch
    given = (y, z, decays.per_head, decays.reach, decays.reach, decays.by_segment, states)
    launch(*[x for x in given if x is not None])
    return states


def _states_launch(
    y: Tensor, z: Tensor, decays: Decays, cut: Cut, config: Config,
    reverse: bool, every: bool, beside: bool,
) -> Launch:  # fmt: skip
    segments, flat = cut.segments, can_be_flat(y, z)
    heads, key_dim, value_dim = y.shape[2], y.shape[3], z.shape[3]
    tile_k, tile_v = padded(key_dim), config.value_tile
    listed = segments.with_predecessor if reverse else segments.with_successor
    if every:
        listed = segments.table
    fixed: dict[str, Any] = {
        "p_table": listed, "M": segments.count, "H": heads, "K": key_dim, "V": value_dim,
        "DECAY": decays.kind, "REVERSE": reverse, "FLAT": flat, "C": config.chunk,
        "BK": tile_k, "BV": tile_v, "STAGES": config.num_stages, "PRECISION": precision(y.dtype),
        "LATE": beside and can_overlap(y.device),
    }  # fmt: skip
    windows = {
        "d_y": Window(config.chunk, tile_k, flat=flat),
        "d_z": Window(config.chunk, tile_v, flat=flat),
    }
    if decays.reach is None:
        fixed |= dict.fromkeys(("d_reach", "p_reach", "p_by_segment")) | {"stride_reach": 0}
    else:
        fixed |= {"p_decay": None, "stride_reach": decays.reach.stride(0)}
        windows["d_reach"] = Window(1, config.chunk, flat=True)
    return Launch(
        segment_states_kernel,
        (len(listed) * heads, triton.cdiv(value_dim, tile_v)),
        fixed=fixed,
        windows=windows,
        num_warps=config.num_warps,
        overlap=can_overlap(y.device),
    )


def enter_segments(
    states: Tensor,
    decays: Decays,
    cut: Cut,
    *,
    initial: Tensor | None = None,
    entries: Tensor | None = None,
    final: Tensor | None = None,
    reverse: bool,
) -> None:
    """Write what enters each segment into `entries` [M, H, K, V], which may be `states`, and what
    leaves each sequence into `final` [S, H, K, V], for `initial` or zero in.
    """
    key = ("enter", reverse, initial is None, entries is None, final is None)
    launch = cut.launches.get(key)
    optional = {"p_entries": entries, "p_initial": initial, "p_final": final}
    if launch is None:
        launch = cut.launches[key] = _enter_launch(states, decays.kind, cut, optional, reverse)
    given = (entries, initial, final, decays.per_head, decays.by_segment)
    launch(states, *[x for x in given if x is not None])


def _enter_launch(
    states: Tensor, kind: int, cut: Cut, optional: dict[str, Tensor | None], reverse: bool
) -> Launch:
    _, heads, key_dim, value_dim = states.shape
    size, block = key_dim * value_dim, 1024
    fixed: dict[str, Any] = {
        "p_bounds": cut.segments.bounds, "p_first": cut.segments.first, "H": heads, "KV": size,
        "TILES": triton.cdiv(size, block),
        "DECAY": kind, "REVERSE": reverse, "BLOCK": block,
    }  # fmt: skip
    fixed |= {name: None for name, x in optional.items() if x is None}
    fixed["p_by_segment" if kind == 1 else "p_decay"] = None
    grid = (cut.segments.num_sequences * heads * triton.cdiv(size, block),)
    return Launch(enter_segments_kernel, grid, fixed=fixed, overlap=can_overlap(states.device))
