# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Decoding on Triton with deferred writes: a step reads the state, and seldom writes it.

Legend: B batch, T tokens, H heads, K key dim, V value dim, N slots of pending tokens.

Beside the state S lie the keys and values of the tokens that are not yet in it, and the decays
that each has gone through since, w_j, as S has, w. A step makes

    o = w q S + Σ_j w_j (q·k_j) v_j

over them and its own token, and keeps that one too. When N are there it folds them instead,
S = w S + Σ_j w_j k_jᵀ v_j, and writes S. Sums and decays are float32; keys and values are kept as
they came.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning.plan import Plan, dense
from seqpar.kernels.lightning.tuning import padded

__all__ = ["DeferredState"]


@triton.jit
def deferred_step_kernel(
    p_q, p_k, p_v, p_decay, p_out, p_state, p_keys, p_values, p_weights, p_counts,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILES: tl.constexpr,
    DECAY: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    MASKED: tl.constexpr, EVICT: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """One token. Grid: (B * H * value tiles,).

    Slot N - 1 is never kept, as a fold empties all: its weight's place is the state's own, w.
    """
    i_program = tl.program_id(0)
    i_state, i_v = i_program // TILES, i_program % TILES
    o_n, o_k = tl.arange(0, N), tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_S = m_k[:, None] & m_v[None, :]
    p_S = p_state + i_state.to(tl.int64) * K * V + (o_k[:, None] * V + o_v[None, :])
    if EVICT:
        b_S = tl.load(p_S, mask=m_S, other=0.0, eviction_policy="evict_first")
    else:
        b_S = tl.load(p_S, mask=m_S, other=0.0)
    count = tl.load(p_counts + i_program)
    p_weight = p_weights + i_program * N
    b_weight = tl.load(p_weight + o_n)
    weight = tl.load(p_weight + N - 1)
    b_q = tl.load(p_q + i_state.to(tl.int64) * K + o_k, mask=m_k, other=0.0).to(tl.float32)
    b_k = tl.load(p_k + i_state.to(tl.int64) * K + o_k, mask=m_k, other=0.0)
    b_v = tl.load(p_v + i_state.to(tl.int64) * V + o_v, mask=m_v, other=0.0)
    decay = 1.0
    if DECAY:
        if DECAY == 1:
            decay = tl.exp(tl.load(p_decay + i_state % H).to(tl.float32))
        else:
            decay = tl.exp(tl.load(p_decay + i_state).to(tl.float32))
    i_slot = i_state.to(tl.int64) * N
    p_key = p_keys + i_slot * K + (o_n[:, None] * K + o_k[None, :])
    p_value = p_values + i_slot * V + (o_n[:, None] * V + o_v[None, :])
    m_kept = o_n < count
    m_new = o_n == count
    if MASKED:
        b_keys = tl.load(p_key, mask=m_kept[:, None] & m_k[None, :], other=0.0)
        b_values = tl.load(p_value, mask=m_kept[:, None] & m_v[None, :], other=0.0)
    else:
        b_keys = tl.load(p_key, mask=m_k[None, :], other=0.0)
        b_values = tl.load(p_value, mask=m_v[None, :], other=0.0)
    if DECAY:
        b_weight *= decay
        weight *= decay
    b_weight = tl.where(m_kept, b_weight, tl.where(m_new, 1.0, 0.0))
    b_keys = tl.where(m_new[:, None], b_k[None, :], b_keys).to(tl.float32)
    b_values = tl.where(m_new[:, None], b_v[None, :], b_values).to(tl.float32)
    b_score = tl.sum(b_keys * b_q[None, :], 1) * b_weight
    b_out = tl.sum(b_score[:, None] * b_values, 0)
    b_out += weight * tl.sum(b_q[:, None] * b_S, 0)
    tl.store(p_out + i_state.to(tl.int64) * V + o_v, b_out.to(p_out.dtype.element_ty), mask=m_v)
    if count == N - 1:
        if FOLD == 0:
            b_S = weight * b_S + b_k.to(tl.float32)[:, None] * b_v.to(tl.float32)[None, :]
            for j in range(0, count):
                i_slot = i_state.to(tl.int64) * N + j
                b_key = tl.load(p_keys + i_slot * K + o_k, mask=m_k, other=0.0).to(tl.float32)
                b_value = tl.load(p_values + i_slot * V + o_v, mask=m_v, other=0.0)
                b_key *= decay * tl.load(p_weight + j)
                b_S += b_key[:, None] * b_value.to(tl.float32)[None, :]
        elif FOLD == 1:
            b_left = tl.trans(b_keys * b_weight[:, None])
            b_S = weight * b_S + tl.dot(b_left, b_values, input_precision="tf32x3")
        elif FOLD == 2:
            b_left = tl.trans(b_keys * b_weight[:, None])
            b_right = b_values.to(tl.bfloat16)
            b_high = b_left.to(tl.bfloat16)
            b_left -= b_high
            b_middle = b_left.to(tl.bfloat16)
            b_left -= b_middle
            b_sum = tl.dot(b_left.to(tl.bfloat16), b_right)
            b_sum = tl.dot(b_middle, b_right, b_sum)
            b_S = weight * b_S + tl.dot(b_high, b_right, b_sum)
        tl.debug_barrier()  # every warp has read the weights
        if EVICT:
            tl.store(p_S, b_S, mask=m_S, eviction_policy="evict_first")
        else:
            tl.store(p_S, b_S, mask=m_S)
        tl.store(p_weight + o_n, tl.where(o_n == N - 1, 1.0, 0.0))
        tl.store(p_counts + i_program, 0)
    else:
        tl.debug_barrier()
        i_slot = i_state.to(tl.int64) * N + count
        if i_v == 0:
            tl.store(p_keys + i_slot * K + o_k, b_k, mask=m_k)
        tl.store(p_values + i_slot * V + o_v, b_v, mask=m_v)
        tl.store(p_weight + o_n, tl.where(o_n == N - 1, weight, b_weight))
        tl.store(p_counts + i_program, count + 1)


@triton.jit
def folded_steps_kernel(
    p_q, p_k, p_v, p_decay, p_out, p_state, p_keys, p_values, p_weights, p_counts, p_new,
    T, H, K, V, TILES,
    DECAY: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    RUNS: tl.constexpr,
):  # fmt: skip
    """The state with all that is pending in it, after T tokens more. Grid: (B * H * value tiles,).

    With RUNS, what is pending begins anew.
    """
    i_program = tl.program_id(0)
    i_state, i_v = i_program // TILES, i_program % TILES
    i_h, i_b = i_state % H, i_state // H
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_S = m_k[:, None] & m_v[None, :]
    o_S = i_state.to(tl.int64) * K * V + o_k[:, None] * V + o_v[None, :]
    p_weight = p_weights + i_program * N
    b_S = tl.load(p_state + o_S, mask=m_S, other=0.0) * tl.load(p_weight + N - 1)
    for j in range(0, tl.load(p_counts + i_program)):
        i_slot = i_state.to(tl.int64) * N + j
        b_k = tl.load(p_keys + i_slot * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_values + i_slot * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        b_S += (b_k * tl.load(p_weight + j))[:, None] * b_v[None, :]
    if RUNS:
        for t in range(0, T):
            i_row = (i_b * T + t).to(tl.int64) * H + i_h
            b_q = tl.load(p_q + i_row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_k = tl.load(p_k + i_row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
            b_v = tl.load(p_v + i_row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
            if DECAY == 2:
                b_S *= tl.exp(tl.load(p_decay + i_row).to(tl.float32))
            elif DECAY == 1:
                b_S *= tl.exp(tl.load(p_decay + i_h).to(tl.float32))
            b_S += b_k[:, None] * b_v[None, :]
            b_out = tl.sum(b_q[:, None] * b_S, 0)
            tl.store(p_out + i_row * V + o_v, b_out.to(p_out.dtype.element_ty), mask=m_v)
        tl.debug_barrier()  # every warp has read what is written now
        o_n = tl.arange(0, N)
        tl.store(p_weight + o_n, tl.where(o_n == N - 1, 1.0, 0.0))
        tl.store(p_counts + i_program, i_state % N)
    tl.store(p_new + o_S, b_S, mask=m_S)


class DeferredState:
    """A state [B, H, K, V] and what is pending beside it, on one device.

    Every program counts its own tokens, on the device, so that a CUDA graph of a step can be
    replayed. States begin at counts apart from each other, with nothing in the slots before: every
    step then folds as many.
    """

    def __init__(
        self, state: Tensor, dtype: torch.dtype, pending: int, *,
        tile: int | None = None, num_warps: int | None = None, masked: bool = True,
        evict: bool = False, stagger: bool = True, fold: int = 0,
        maxnreg: int | None = None,
    ) -> None:  # fmt: skip
        batch, heads, key_dim, value_dim = state.shape
        self.pending, self.maxnreg = pending, maxnreg
        self.state = dense(state).clone()
        self.tile = min(padded(value_dim), tile or 32)
        self.tiles = triton.cdiv(value_dim, self.tile)
        self.num_warps = num_warps or 4
        self.options = {"MASKED": masked, "EVICT": evict, "FOLD": fold}
        kept = (batch, heads, pending)
        self.keys = state.new_zeros((*kept, key_dim), dtype=dtype)
        self.values = state.new_zeros((*kept, value_dim), dtype=dtype)
        self.weights = state.new_zeros((batch, heads, self.tiles, pending), dtype=torch.float32)
        self.weights[..., -1] = 1.0
        counts = torch.arange(batch * heads, dtype=torch.int32, device=state.device) % pending
        counts = counts.view(batch, heads, 1).expand(-1, -1, self.tiles)
        self.counts = (counts if stagger else 0 * counts).contiguous()
        self._launches: dict[Any, Launch] = {}

    def step(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        launch = self._launches.get(plan)
        if launch is None:
            launch = self._launches[plan] = self._launch(plan)
        q, k, v = dense(q), dense(k), dense(v)
        out = torch.empty_like(v)
        if log_decay is None:
            launch(q, k, v, out)
        else:
            launch(q, k, v, dense(log_decay, torch.float32), out)
        return out

    def folded(self) -> Tensor:
        """[B, H, K, V] float32 with all that is pending in it."""
        new = torch.empty_like(self.state)
        nothing = dict.fromkeys(("p_q", "p_k", "p_v", "p_decay", "p_out"))
        fixed = {**self._fixed(0), **nothing, "T": 0, "H": self.state.shape[1], "RUNS": False}
        Launch(folded_steps_kernel, self._grid, fixed=fixed, num_warps=self.num_warps)(new)
        return new

    @property
    def _grid(self) -> tuple[int, ...]:
        return (self.counts.numel(),)

    def _fixed(self, decay: int) -> dict[str, Any]:
        key_dim, value_dim = self.state.shape[2:]
        fixed: dict[str, Any] = {
            "p_state": self.state, "p_keys": self.keys, "p_values": self.values,
            "p_weights": self.weights, "p_counts": self.counts, "H": self.state.shape[1],
            "K": key_dim, "V": value_dim, "TILES": self.tiles, "DECAY": decay, "N": self.pending,
            "BK": padded(key_dim), "BV": self.tile,
        }  # fmt: skip
        if decay == 0:
            fixed["p_decay"] = None
        return fixed

    def _launch(self, plan: Plan) -> Launch:
        fixed = self._fixed({0: 0, 1: 1, 3: 2}[plan.problem.decay_dims])
        tokens = plan.problem.tokens
        if tokens == 1:
            fixed |= self.options
            made = Launch(deferred_step_kernel, self._grid, fixed=fixed, num_warps=self.num_warps)
            if self.maxnreg:
                made._options["maxnreg"] = self.maxnreg
            return made
        fixed |= {"T": tokens, "RUNS": True, "p_new": self.state}
        return Launch(folded_steps_kernel, self._grid, fixed=fixed, num_warps=self.num_warps)
