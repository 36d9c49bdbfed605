# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernel of `add_entry_product`; imported only where it is launched.

Legend: i_ index, o_ offset, p_ pointer, m_ mask, b_ block value.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["entry_product_kernel"]


@triton.jit(do_not_specialize=["num_tokens"])  # new with every batch
def entry_product_kernel(
    out,
    x,
    matrix,
    log_decay,
    num_tokens,
    num_heads,
    inner,
    width,
    s_out_b,
    s_out_t,
    s_out_h,
    s_out_y,
    s_x_b,
    s_x_t,
    s_x_h,
    s_x_x,
    s_m_b,
    s_m_h,
    s_m_x,
    s_m_y,
    LOG_FLOOR: tl.constexpr,
    LOWEST: tl.constexpr,
    FROM_END: tl.constexpr,
    IEEE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
):
    """out[t] += exp(g n_t) x[t] @ matrix for one tile of tokens and columns of one (b, h).

    Grid (tiles of tokens, tiles of columns, B * H). Tiles are counted in steps from the state, so
    tile 0 holds the nearest tokens, and a tile that starts beyond the reach ends at once. Example:
    g = log(1/2), X = Y = 1, x = (1, 1), matrix = 8, from the start: out += (4, 2).
    """
    i_tile, i_y, i_bh = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    i_b, i_h = i_bh // num_heads, i_bh % num_heads
    b_g = tl.maximum(tl.load(log_decay + i_h), LOWEST)
    first = 0 if FROM_END else 1
    if b_g * (i_tile * BLOCK_T + first) < LOG_FLOOR:
        return
    o_n = i_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    b_log = b_g * (o_n + first)
    o_t = (num_tokens - 1 - o_n if FROM_END else o_n).to(tl.int64)
    m_t = (o_n < num_tokens) & (b_log >= LOG_FLOOR)
    o_x, o_y = tl.arange(0, BLOCK_X), i_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    m_x, m_y = o_x < inner, o_y < width

    p_x = x + i_b * s_x_b + i_h * s_x_h + o_t[:, None] * s_x_t + o_x[None, :] * s_x_x
    p_m = matrix + i_b * s_m_b + i_h * s_m_h + o_x[:, None] * s_m_x + o_y[None, :] * s_m_y
    p_out = out + i_b * s_out_b + i_h * s_out_h + o_t[:, None] * s_out_t + o_y[None, :] * s_out_y
    b_x = tl.load(p_x, mask=m_t[:, None] & m_x[None, :], other=0.0).to(tl.float32)
    b_m = tl.load(p_m, mask=m_x[:, None] & m_y[None, :], other=0.0)
    if IEEE:
        b_product = tl.dot(b_x, b_m, input_precision="ieee")
    else:
        b_product = tl.dot(b_x, b_m, input_precision="tf32")
    m_out = m_t[:, None] & m_y[None, :]
    b_out = tl.load(p_out, mask=m_out, other=0.0).to(tl.float32)
    b_out += b_product * tl.exp(b_log)[:, None]
    tl.store(p_out, b_out.to(out.dtype.element_ty), mask=m_out)
