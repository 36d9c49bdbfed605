# mypy: disable-error-code="no-untyped-def,untyped-decorator"
"""The Triton kernel of `chain_sums`; imported only where it is launched.

Legend: i_ index, o_ offset, p_ pointer, m_ mask, b_ block value.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["chain_sum_kernel"]


@triton.jit
def chain_sum_kernel(
    p_messages,
    p_decay,
    p_entries,
    p_bounds,
    p_slots,
    p_tokens,
    numel,
    width,
    row_numel,
    share,
    CARRIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """entries[e] = the sum over links first(e) <= l < link(e), each decayed by those after it.

    Grid (tiles of one state, entries). `share` neighbouring elements of a state have one G: from
    behind the state in the message, or decay[...] of one row times the link's tokens. Example, two
    links before, S = 1 and 2, G of the second = log(1/2): entry = 2 + 1/2.
    """
    i_entry = tl.program_id(1)
    o_state = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_state = o_state < numel
    first, link = tl.load(p_bounds + 2 * i_entry), tl.load(p_bounds + 2 * i_entry + 1)
    b_rate = tl.zeros([BLOCK], tl.float64)
    if p_decay is not None:
        o_rate = (o_state % row_numel) // share
        b_rate = tl.load(p_decay + o_rate, mask=m_state, other=0.0).to(tl.float64)
    b_entry = tl.zeros([BLOCK], tl.float32)
    for i in range(first, link):
        p_row = p_messages + tl.load(p_slots + i).to(tl.int64) * width
        b_state = tl.load(p_row + o_state, mask=m_state, other=0.0)
        if CARRIES:
            b_log = tl.load(p_row + numel + o_state // share, mask=m_state, other=0.0)
            b_entry = b_entry * tl.exp(b_log)
        elif p_decay is not None:
            b_log = b_rate * tl.load(p_tokens + i)
            b_entry = b_entry * tl.exp(b_log.to(tl.float32))
        b_entry += b_state
    tl.store(p_entries + i_entry.to(tl.int64) * numel + o_state, b_entry, mask=m_state)
