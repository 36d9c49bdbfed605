# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Decoding on Triton with deferred writes: a step reads every state and writes an Nth of them.

Legend: B batch, H heads, K key dim, V value dim, N slots, of which N - 1 keep a token each.

Beside a state S lie keys and values of the tokens that are not yet in it, and the decays that each
has gone through since, w_j, as S has, w. A step makes

    o = w q S + Σ_j w_j (q·k_j) v_j

over them and its own token, and keeps that one too. With N - 1 there it folds them and its own,
S = w S + Σ_j w_j k_jᵀ v_j, and writes S. Sums and decays are float32; keys and values stay as they
came. State i begins with i % N tokens of weight zero: every step then folds as many.

Floor: each state read once, an Nth of them written. On an H200 with 64 heads of 128 x 128, steps
of many layers in turn: 0.76 of it at batch 16, 0.88 at 64, 0.92 at 256; at batch 1, N = 1, 0.53.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning.plan import Plan, dense
from seqpar.kernels.lightning.step import step_triton
from seqpar.kernels.lightning.tuning import padded

__all__ = ["DeferredState"]

_FEW_STATES = 128
"""Up to here a launch takes longer than what it moves: every step writes, in small programs."""


@triton.jit
def folded(
    b_S, decay, p_key, p_value, p_weight, m_k, m_v,
    K: tl.constexpr, V: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """decay (w S + Σ_j w_j k_jᵀ v_j), keys and values being slot 0's; an empty slot weighs 0."""
    b_S *= decay * tl.load(p_weight + N - 1)
    for j in tl.static_range(N - 1):
        b_key = tl.load(p_key + j * K, mask=m_k, other=0.0).to(tl.float32)
        b_value = tl.load(p_value + j * V, mask=m_v, other=0.0).to(tl.float32)
        b_value *= decay * tl.load(p_weight + j)
        b_S += b_key[:, None] * b_value[None, :]
    return b_S


@triton.jit
def deferred_step_kernel(
    p_q, p_k, p_v, p_decay, p_out, p_state, p_keys, p_values, p_weights, p_steps,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILES: tl.constexpr,
    DECAY: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One token. Grid: (B * H * value tiles,).

    Weights [N] of a program: of its slots, and last, as the Nth token is never kept, w of S.
    Steps: in the upper 32 bits those done, in the lower the programs that are through this one.
    Slots are padded to ROWS, over which they are summed together with q S.

    Example, N = 2, decay 1/2, k = q = 1, S = 4, slot empty: v = 2 gives o = 2 + 2, keeps S;
    then v = 6 gives o = 1/4 * 4 + 1/2 * 2 + 6 and writes S = 8.
    """
    i_program = tl.program_id(0)
    i_state, i_v = (i_program // TILES).to(tl.int64), i_program % TILES
    o_n, o_k = tl.arange(0, ROWS), tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    p_S = p_state + i_state * (K * V) + o_k[:, None] * V + o_v[None, :]
    m_S = m_k[:, None] & m_v[None, :]
    b_S = tl.load(p_S, mask=m_S, other=0.0, eviction_policy="evict_first")
    p_weight = p_weights + i_program.to(tl.int64) * N
    b_weight = tl.load(p_weight + o_n, mask=o_n < N - 1, other=0.0)
    weight = tl.load(p_weight + N - 1)
    b_q = tl.load(p_q + i_state * K + o_k, mask=m_k, other=0.0)
    b_k = tl.load(p_k + i_state * K + o_k, mask=m_k, other=0.0)
    b_v = tl.load(p_v + i_state * V + o_v, mask=m_v, other=0.0)
    count = ((i_state + (tl.load(p_steps) >> 32)) & (N - 1)).to(tl.int32)
    m_kept, m_new = o_n < count, o_n == count
    p_keys += i_state * (N * K)
    p_values += i_state * (N * V)
    p_slots = p_keys + o_n[:, None] * K + o_k[None, :]
    b_keys = tl.load(p_slots, mask=m_kept[:, None] & m_k[None, :], other=0.0)
    p_slots = p_values + o_n[:, None] * V + o_v[None, :]
    b_values = tl.load(p_slots, mask=m_kept[:, None] & m_v[None, :], other=0.0)

    decay = 1.0
    if DECAY == 1:
        decay = tl.exp(tl.load(p_decay + i_state % H))
    elif DECAY == 2:
        decay = tl.exp(tl.load(p_decay + i_state))
    b_q = b_q.to(tl.float32)
    b_keys = tl.where(m_new[:, None], b_k[None, :], b_keys).to(tl.float32)
    b_values = tl.where(m_new[:, None], b_v[None, :], b_values).to(tl.float32)
    b_weight = tl.where(m_new, 1.0, b_weight * decay)
    weight *= decay

    b_score = tl.sum(b_keys * b_q[None, :], 1) * b_weight
    b_part = tl.sum(tl.reshape(b_q[:, None] * b_S, (BK // ROWS, ROWS, BV)), 0)
    b_out = tl.sum(weight * b_part + b_score[:, None] * b_values, 0)
    tl.store(p_out + i_state * V + o_v, b_out.to(p_out.dtype.element_ty), mask=m_v)

    if count == N - 1:
        b_S = folded(b_S, decay, p_keys + o_k, p_values + o_v, p_weight, m_k, m_v, K, V, N)
        b_S += b_k.to(tl.float32)[:, None] * b_v.to(tl.float32)[None, :]
        tl.store(p_S, b_S, mask=m_S, eviction_policy="evict_first")
        b_weight = tl.where(o_n == N - 1, 1.0, 0.0)
    else:
        if i_v == 0:
            tl.store(p_keys + count * K + o_k, b_k, mask=m_k)
        tl.store(p_values + count * V + o_v, b_v, mask=m_v)
        b_weight = tl.where(o_n == N - 1, weight, b_weight)
    tl.debug_barrier()  # every warp has read the weights and the steps
    tl.store(p_weight + o_n, b_weight, mask=o_n < N)
    programs = tl.num_programs(0).to(tl.int64)
    added = tl.where(i_program == 0, (1 << 32) + 1 - programs, 1)
    tl.atomic_add(p_steps, added, sem="relaxed")


@triton.jit
def fold_kernel(
    p_state, p_keys, p_values, p_weights,
    K: tl.constexpr, V: tl.constexpr, TILES: tl.constexpr, N: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """All that is pending into the state, in place. Grid: (B * H * value tiles,)."""
    i_program = tl.program_id(0)
    i_state, i_v = (i_program // TILES).to(tl.int64), i_program % TILES
    o_n, o_k = tl.arange(0, N), tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_S = m_k[:, None] & m_v[None, :]
    p_S = p_state + i_state * (K * V) + o_k[:, None] * V + o_v[None, :]
    p_weight = p_weights + i_program.to(tl.int64) * N
    p_key, p_value = p_keys + i_state * (N * K) + o_k, p_values + i_state * (N * V) + o_v
    b_S = tl.load(p_S, mask=m_S, other=0.0)
    tl.store(p_S, folded(b_S, 1.0, p_key, p_value, p_weight, m_k, m_v, K, V, N), mask=m_S)
    tl.debug_barrier()  # every warp has read the weights
    tl.store(p_weight + o_n, tl.where(o_n == N - 1, 1.0, 0.0))


class DeferredState:
    """States [B, H, K, V] and what is pending beside them, on one device.

    Everything that a step changes is on the device, the count of steps too, so that a CUDA graph of
    a step can be replayed.
    """

    def __init__(self, state: Tensor, dtype: torch.dtype, pending: int | None) -> None:
        batch, heads, key_dim, value_dim = state.shape
        self._tile, self._num_warps = _tile(batch * heads, key_dim, value_dim)
        tiles = triton.cdiv(value_dim, self._tile)
        slots = pending or (1 if batch * heads <= _FEW_STATES else 8)
        self._grid = (batch * heads * tiles,)
        self._state = state.to(torch.float32).clone(memory_format=torch.contiguous_format)
        kept = (batch, heads, slots)
        weights = state.new_zeros((batch, heads, tiles, slots), dtype=torch.float32)
        weights[..., -1] = 1.0
        self._fixed: dict[str, Any] = {
            "p_state": self._state, "p_weights": weights,
            "p_keys": state.new_zeros((*kept, key_dim), dtype=dtype),
            "p_values": state.new_zeros((*kept, value_dim), dtype=dtype),
            "K": key_dim, "V": value_dim, "TILES": tiles, "N": slots,
            "BK": padded(key_dim), "BV": self._tile,
        }  # fmt: skip
        self._steps = state.new_zeros(1, dtype=torch.int64)
        self._launches: dict[int, Launch] = {}
        self._fold = Launch(fold_kernel, self._grid, fixed=self._fixed, num_warps=self._num_warps)

    def step(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        """o [B, T, H, V] in v's dtype. A few tokens at once follow a fold of what is pending."""
        if plan.problem.tokens > 1:
            self._fold()
            return step_triton(plan, q, k, v, self._state, log_decay, into=self._state)[0]
        decay_dims = plan.problem.decay_dims
        launch = self._launches.get(decay_dims)
        if launch is None:
            launch = self._launches[decay_dims] = self._step_launch(plan)
        q, k, v = dense(q), dense(k), dense(v)
        out = torch.empty_like(v)
        if log_decay is None:
            launch(q, k, v, out)
        else:
            launch(q, k, v, dense(log_decay, torch.float32), out)
        return out

    def current(self) -> Tensor:
        """[B, H, K, V] float32 with every token in it, a copy."""
        self._fold()
        return self._state.clone()

    def _step_launch(self, plan: Plan) -> Launch:
        decay = {0: 0, 1: 1, 3: 2}[plan.problem.decay_dims]
        rows = max(self._fixed["N"], 128 * self._num_warps // self._tile)
        fixed = {
            **self._fixed, "p_steps": self._steps, "H": plan.problem.heads, "DECAY": decay,
            "ROWS": rows,
        }  # fmt: skip
        if decay == 0:
            fixed["p_decay"] = None
        return Launch(deferred_step_kernel, self._grid, fixed=fixed, num_warps=self._num_warps)


def _tile(num_states: int, key_dim: int, value_dim: int) -> tuple[int, int]:
    """Columns of a state that one program carries, and its warps."""
    if num_states <= _FEW_STATES:
        return 16, 2
    return 64 if num_states >= 1024 and key_dim <= 128 and value_dim > 32 else 32, 4
