# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""Decoding on Triton: a few recurrent steps, the state read once and written once.

Legend: B batch, T tokens, H heads, K key dim, V value dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqpar.kernels.lightning.tuning import padded

__all__ = ["step_triton"]


@triton.jit
def step_kernel(
    p_q, p_k, p_v, p_decay, p_state, p_out, p_new, T, H, K, V,
    DECAY: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """S_t = exp(g_t) S_(t-1) + k_tᵀ v_t, o_t = q_t S_t, in float32. Grid: (value tiles, B * H).

    Example, decay 1/2, k = q = 1, v = 2, state 4: S = 2 + 2, o = 4.
    """
    i_h, i_b = tl.program_id(1) % H, tl.program_id(1) // H
    o_k = tl.arange(0, BK)
    o_v = tl.program_id(0) * BV + tl.arange(0, BV)
    m_k, m_v = o_k < K, o_v < V
    m_S = m_k[:, None] & m_v[None, :]
    o_S = tl.program_id(1).to(tl.int64) * K * V + o_k[:, None] * V + o_v[None, :]
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
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o [B, T, H, V] in v's dtype and the new state [B, H, K, V] float32."""
    batch, tokens, heads, key_dim = q.shape
    value_dim = v.shape[3]
    state = state.float().contiguous()
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    new_state = torch.empty_like(state)
    tile = min(padded(value_dim), 16 if batch * heads < 512 else 32)
    step_kernel[(triton.cdiv(value_dim, tile), batch * heads)](
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        None if log_decay is None else log_decay.contiguous(),
        state,
        out,
        new_state,
        tokens,
        heads,
        key_dim,
        value_dim,
        DECAY=0 if log_decay is None else 1 if log_decay.ndim == 1 else 2,
        BK=padded(key_dim),
        BV=tile,
        num_warps=2 if tile == 16 else 4,
    )
    return out, new_state
