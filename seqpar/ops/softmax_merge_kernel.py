"""Triton kernel of `merge_lse_`: one pass over the rows, one rounding.

Legend: B batch, T tokens, H heads, V value dim; a row is one (batch, token, head).
Imported only where a CUDA tensor is merged, or by tests under Triton's interpreter.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["merge_lse_triton_"]

ROWS = 16
"""Rows a program: 16 rows of 128 values keep 4 warps busy with 16-byte accesses."""


VARYING = ("T", "num_rows", "s_lb", "s_lt", "s_lh", "s_mb", "s_mt", "s_mh")
"""What follows from lengths. Triton would compile anew wherever one of them is 1, or stops being
divisible by 16: with documents of new lengths in every batch, dozens of times."""


@triton.jit(do_not_specialize=VARYING, do_not_specialize_on_alignment=("p_lse", "p_new_lse"))
def merge_lse_kernel(
    p_out,
    p_lse,
    p_new_out,
    p_new_lse,
    T,
    H,
    num_rows,
    s_ob,
    s_ot,
    s_oh,
    s_lb,
    s_lt,
    s_lh,
    s_nb,
    s_nt,
    s_nh,
    s_mb,
    s_mt,
    s_mh,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr,
):
    """out, lse <- merged, in place. Grid: ceil(B T H / ROWS).

    Two rows of one value: out 1, lse 0 with new_out 3, lse log 3 gives out 2.5, lse log 4.

    A row's lse is read by every warp that needs it and written by one: all must have read before.
    """
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # 32 bits: their division is quick
    m_row = i_row < num_rows
    i_h, i_t = (i_row % H).to(tl.int64), (i_row // H % T).to(tl.int64)
    i_b = (i_row // H // T).to(tl.int64)
    p_lse += i_b * s_lb + i_t * s_lt + i_h * s_lh
    p_new_lse += i_b * s_mb + i_t * s_mt + i_h * s_mh
    b_old = tl.load(p_lse, mask=m_row, other=0.0)
    b_new = tl.load(p_new_lse, mask=m_row, other=0.0)
    b_top, b_low = tl.maximum(b_old, b_new), tl.minimum(b_old, b_new)
    # exp(low - top) is NaN for two empty rows, so that it is replaced and not only weighted.
    b_share = tl.where(b_low == float("-inf"), 0.0, tl.exp(b_low - b_top))
    b_lse = b_top + tl.log(1.0 + b_share)
    b_weight = tl.where(b_old == float("-inf"), 0.0, tl.exp(b_old - b_lse))
    b_new_weight = tl.where(b_new == float("-inf"), 0.0, tl.exp(b_new - b_lse))

    i_v = tl.arange(0, BLOCK_V)
    m_out = m_row[:, None] & (i_v < V)[None, :]
    o_out = (i_b * s_ob + i_t * s_ot + i_h * s_oh)[:, None] + i_v[None, :]
    o_new = (i_b * s_nb + i_t * s_nt + i_h * s_nh)[:, None] + i_v[None, :]
    b_out = tl.load(p_out + o_out, mask=m_out, other=0.0).to(tl.float32)
    b_new_out = tl.load(p_new_out + o_new, mask=m_out, other=0.0).to(tl.float32)
    b_merged = b_weight[:, None] * b_out + b_new_weight[:, None] * b_new_out
    tl.debug_barrier()
    tl.store(p_lse, b_lse, mask=m_row)
    tl.store(p_out + o_out, b_merged.to(p_out.dtype.element_ty), mask=m_out)


def merge_lse_triton_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """`merge_lse_` for float32 lse and tensors whose last dim is contiguous."""
    num_rows, value_dim = lse.numel(), out.shape[-1]
    merge_lse_kernel[(triton.cdiv(num_rows, ROWS),)](
        out,
        lse,
        new_out,
        new_lse,
        lse.shape[1],
        lse.shape[2],
        num_rows,
        *out.stride()[:3],
        *lse.stride(),
        *new_out.stride()[:3],
        *new_lse.stride(),
        V=value_dim,
        BLOCK_V=triton.next_power_of_2(value_dim),
        ROWS=ROWS,
        num_warps=4,
    )
