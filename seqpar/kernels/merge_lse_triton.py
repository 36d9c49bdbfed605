# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""merge_lse in one pass on Triton: each input is read once, each output written once.

Legend: R rows (B * T * H), V value dim.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["merge_lse_triton"]


@triton.jit
def merge_lse_kernel(
    p_out, p_lse, p_new_out, p_new_lse, p_merged_out, p_merged_lse, R, V,
    BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Rows i_r * BR to i_r * BR + BR. Grid: (row tiles,).

    Example: lse 0 and 0 with out 1 and 3 give lse log 2 and out 2.
    """
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    o_v = tl.arange(0, BV)
    m_r = o_r < R
    m_block = m_r[:, None] & (o_v < V)[None, :]
    o_block = o_r[:, None] * V + o_v[None, :]
    b_lse = tl.load(p_lse + o_r, mask=m_r, other=0.0)
    b_new_lse = tl.load(p_new_lse + o_r, mask=m_r, other=0.0)
    b_top = tl.maximum(b_lse, b_new_lse, propagate_nan=tl.PropagateNan.ALL)
    b_base = tl.where(b_top == -float("inf"), 0.0, b_top)
    b_weight, b_new_weight = tl.exp(b_lse - b_base), tl.exp(b_new_lse - b_base)
    b_total = b_weight + b_new_weight
    b_scale = tl.where(b_total > 0.0, 1.0 / tl.where(b_total > 0.0, b_total, 1.0), 0.0)
    m_out = m_block & (b_lse != -float("inf"))[:, None]
    m_new_out = m_block & (b_new_lse != -float("inf"))[:, None]
    b_out = tl.load(p_out + o_block, mask=m_out, other=0.0)
    b_new_out = tl.load(p_new_out + o_block, mask=m_new_out, other=0.0).to(tl.float32)
    b_merged = b_out * (b_weight * b_scale)[:, None] + b_new_out * (b_new_weight * b_scale)[:, None]
    tl.store(p_merged_out + o_block, b_merged, mask=m_block)
    b_log = tl.log(tl.where(b_total > 0.0, b_total, 1.0))
    tl.store(p_merged_lse + o_r, b_top + b_log, mask=m_r)


def merge_lse_triton(
    out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """The merged out [..., V] and lse [...], new float32 tensors."""
    value_dim = out.shape[-1]
    merged_out = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    merged_lse = torch.empty(lse.shape, dtype=torch.float32, device=lse.device)
    tile_v = triton.next_power_of_2(value_dim)
    tile_r = max(1, 2048 // tile_v)
    merge_lse_kernel[(triton.cdiv(lse.numel(), tile_r),)](
        out.contiguous(),
        lse.contiguous(),
        new_out.contiguous(),
        new_lse.contiguous(),
        merged_out,
        merged_lse,
        lse.numel(),
        value_dim,
        BR=tile_r,
        BV=tile_v,
        num_warps=4,
    )
    return merged_out, merged_lse
