"""Triton kernel of `write_sum`: one pass over rows with gaps between them.

Legend: B batch, T tokens, H heads, K dim of a head; a row is one (batch, token, head).
Imported only where CUDA tensors are added, or by tests under Triton's interpreter.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["write_sum_triton"]

ROWS = 32
"""Rows a program: 32 rows of 128 values are 4 accesses of 16 bytes for each thread of 4 warps."""

VARYING = ("T", "num_rows")
"""What follows from lengths, for which no kernel is compiled anew."""


@triton.jit(do_not_specialize=VARYING)
def write_sum_kernel(
    p_total, p_a, p_b, T, num_rows,
    s_tb, s_tt, s_th, s_ab, s_at, s_ah, s_bb, s_bt, s_bh,
    H: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, ROWS: tl.constexpr,
    HAS_B: tl.constexpr,
):  # fmt: skip
    """total <- a + b, in float32, or a alone. Grid: ceil(B T H / ROWS).

    One row of two values: a (1, 2) and b (3, 4) give (4, 6).
    """
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # 32 bits: their division is quick
    i_k = tl.arange(0, BLOCK_K)
    i_h, i_t = (i_row % H).to(tl.int64), (i_row // H % T).to(tl.int64)
    i_b = (i_row // H // T).to(tl.int64)
    m_row = (i_row < num_rows)[:, None] & (i_k < K)[None, :]
    o_total = (i_b * s_tb + i_t * s_tt + i_h * s_th)[:, None] + i_k[None, :]
    o_a = (i_b * s_ab + i_t * s_at + i_h * s_ah)[:, None] + i_k[None, :]
    b_sum = tl.load(p_a + o_a, mask=m_row, other=0.0).to(tl.float32)
    if HAS_B:
        o_b = (i_b * s_bb + i_t * s_bt + i_h * s_bh)[:, None] + i_k[None, :]
        b_sum += tl.load(p_b + o_b, mask=m_row, other=0.0).to(tl.float32)
    tl.store(p_total + o_total, b_sum.to(p_total.dtype.element_ty), mask=m_row)


def write_sum_triton(total: Tensor, terms: Sequence[Tensor]) -> None:
    """`write_sum` of one or two terms of 16 or 32 bits whose last dim is contiguous."""
    a, b = terms[0], terms[-1]
    num_rows, width = total.shape[:3].numel(), total.shape[3]
    write_sum_kernel[(triton.cdiv(num_rows, ROWS),)](
        total, a, b, total.shape[1], num_rows,
        *total.stride()[:3], *a.stride()[:3], *b.stride()[:3],
        H=total.shape[2], K=width, BLOCK_K=triton.next_power_of_2(width), ROWS=ROWS,
        HAS_B=len(terms) == 2, num_warps=4,
    )  # fmt: skip
