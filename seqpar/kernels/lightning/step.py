# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Decoding on Triton: a few recurrent steps, the state read once and written once.

Legend: B batch, T tokens, H heads, K key dim, V value dim.

Floor: the state read once and written once. On an H200 with 64 heads of 128 x 128: 0.25 of it at
batch 1 (8 us, a launch), 0.81 at 16 (a device copy of the state 0.84), 0.93 at 64, 0.97 at 256.
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

__all__ = ["step_triton"]


@triton.jit
def step_kernel(
    p_q, p_k, p_v, p_decay, p_state, p_out, p_new, T, H, K, V, TILES,
    DECAY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S_t = exp(g_t) S_(t-1) + k_tᵀ v_t, o_t = q_t S_t, in float32. Grid: (B * H * value tiles,).

    Example, decay 1/2, k = q = 1, v = 2, state 4: S = 2 + 2, o = 4.
    """
    i_state, i_v = tl.program_id(0) // TILES, tl.program_id(0) % TILES
    i_h, i_b = i_state % H, i_state // H
    o_k = tl.arange(0, BK)
    o_v = i_v * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_S = m_k[:, None] & m_v[None, :]
    o_S = i_state.to(tl.int64) * K * V + o_k[:, None] * V + o_v[None, :]
    b_S = tl.load(p_state + o_S, mask=m_S, other=0.0)
    decay = 1.0
    if DECAY == 1:
        decay = tl.exp(tl.load(p_decay + i_h).to(tl.float32))
    for t in range(0, T):
        i_row = (i_b * T + t).to(tl.int64) * H + i_h
        b_q = tl.load(p_q + i_row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_k = tl.load(p_k + i_row * K + o_k, mask=m_k, other=0.0).to(tl.float32)
        b_v = tl.load(p_v + i_row * V + o_v, mask=m_v, other=0.0).to(tl.float32)
        if DECAY == 2:
            b_S = b_S * tl.exp(tl.load(p_decay + i_row).to(tl.float32))
        elif DECAY == 1:
            b_S = b_S * decay
        b_S += b_k[:, None] * b_v[None, :]
        b_out = tl.sum(b_q[:, None] * b_S, 0)
        tl.store(p_out + i_row * V + o_v, b_out.to(p_out.dtype.element_ty), mask=m_v)
    tl.store(p_new + o_S, b_S, mask=m_S)


def step_triton(
    plan: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: Tensor,
    log_decay: Tensor | None,
    *,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype and the new state [B, H, K, V] float32.

    The new state is `into` if that is given, which may be the state itself.
    """
    launch = plan.step_launch
    if launch is None:
        launch = plan.step_launch = _step_launch(plan)
    q, k, v, state = dense(q), dense(k), dense(v), dense(state, torch.float32)
    out, new_state = torch.empty_like(v), torch.empty_like(state) if into is None else into
    if log_decay is None:
        launch(q, k, v, state, out, new_state)
    else:
        launch(q, k, v, dense(log_decay, torch.float32), state, out, new_state)
    return out, new_state


def _columns(num_states: int) -> int:
    """Columns of a state that one program carries: few states are cut fine, to fill the device and
    to end at one time; many are read best in long rows.
    """
    if num_states < 512:
        return 16
    return 32 if num_states < 4096 else 64


def _step_launch(plan: Plan) -> Launch:
    batch, tokens, heads, key_dim, value_dim = plan.problem[:5]
    decay = {0: 0, 1: 1, 3: 2}[plan.problem.decay_dims]
    tile = min(padded(value_dim), _columns(batch * heads))
    tiles = triton.cdiv(value_dim, tile)
    fixed: dict[str, Any] = {
        "T": tokens, "H": heads, "K": key_dim, "V": value_dim, "TILES": tiles, "DECAY": decay,
        "BK": padded(key_dim), "BV": tile,
    }  # fmt: skip
    if decay == 0:
        fixed["p_decay"] = None
    grid = (batch * heads * tiles,)
    return Launch(step_kernel, grid, fixed=fixed, num_warps=2 if tile == 16 else 4)
