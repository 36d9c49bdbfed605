# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

"""target_loss on Triton: a row of logits becomes its gradient where it lies.

Legend: T rows (tokens), V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["target_loss_triton"]


@triton.jit
def target_loss_kernel(
    p_logits, p_labels, p_nll, p_gradient, p_weight, factor, cap, V, stride, gradient_stride,
    IGNORED: tl.constexpr, CAPPED: tl.constexpr, WITH_GRADIENT: tl.constexpr,
    WEIGHTED: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Row i_t. Grid: (T,).

    x = factor * logits, then cap * tanh(x / cap) if CAPPED. With m = max x and the target y:

        nll = m - x_y + log(sum_v exp(x_v - m)),    gradient_v = (p_v - [v = y]) dx_v / dlogits_v

    p_y - 1 is -(sum over the others) / sum, which keeps its digits where p_y is nearly 1. The row
    is read twice, the second time mostly from cache. `p_gradient` may be `p_logits`. If WEIGHTED,
    the gradient is multiplied by the one number at `p_weight`.

    Example: logits 0 and 0, target 0: nll log 2, gradient -1/2 and 1/2.
    """
    i_t = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_t * stride
    p_out = p_gradient + i_t * gradient_stride
    i_y = tl.load(p_labels + i_t)
    if i_y == IGNORED:
        tl.store(p_nll + i_t, 0.0)
        if WITH_GRADIENT:
            for start in range(0, V, BV):
                o_v = start + tl.arange(0, BV)
                tl.store(p_out + o_v, tl.zeros([BV], p_out.dtype.element_ty), mask=o_v < V)
        return
    x_y = _bent(tl.load(p_row + i_y).to(tl.float32) * factor, cap, CAPPED)
    top, others = x_y, 0.0
    for start in range(0, V, BV):
        o_v = start + tl.arange(0, BV)
        b_x = tl.load(p_row + o_v, mask=o_v < V, other=0.0).to(tl.float32) * factor
        b_x = tl.where((o_v < V) & (o_v != i_y), _bent(b_x, cap, CAPPED), -float("inf"))
        new_top = tl.maximum(top, tl.max(b_x, 0))
        others = others * tl.exp(top - new_top) + tl.sum(tl.exp(b_x - new_top), 0)
        top = new_top
    total = others + tl.exp(x_y - top)
    tl.store(p_nll + i_t, top - x_y + tl.log(total))
    if WITH_GRADIENT:
        share = 1.0 / total
        outer = factor
        if WEIGHTED:
            outer = factor * tl.load(p_weight)
        for start in range(0, V, BV):
            o_v = start + tl.arange(0, BV)
            b_x = tl.load(p_row + o_v, mask=o_v < V, other=0.0).to(tl.float32) * factor
            b_x = _bent(b_x, cap, CAPPED)
            b_gradient = tl.where(o_v == i_y, -others * share, tl.exp(b_x - top) * share) * outer
            if CAPPED:
                b_gradient *= 1.0 - (b_x / cap) * (b_x / cap)
            tl.store(p_out + o_v, b_gradient.to(p_out.dtype.element_ty), mask=o_v < V)


@triton.jit
def _bent(b_x, cap, CAPPED: tl.constexpr):
    """cap * tanh(x / cap), or x; tanh from exp, of the side that does not overflow."""
    if CAPPED:
        b_e = tl.exp(-2.0 * tl.abs(b_x) / cap)
        b_tanh = (1.0 - b_e) / (1.0 + b_e)
        b_x = tl.where(b_x < 0.0, -b_tanh, b_tanh) * cap
    return b_x


def target_loss_triton(
    logits: Tensor,
    labels: Tensor,
    gradient: Tensor | None,
    *,
    weight: Tensor | None = None,
    ignore_index: int,
    factor: float,
    cap: float | None,
) -> Tensor:
    """nll [T] in float32; writes the gradient."""
    num_rows, vocabulary = logits.shape
    nll = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        out = logits if gradient is None else gradient
        block = min(triton.next_power_of_2(vocabulary), 8192)
        target_loss_kernel[(num_rows,)](
            logits,
            labels,
            nll,
            out,
            nll if weight is None else weight,
            factor,
            1.0 if cap is None else cap,
            vocabulary,
            logits.stride(0),
            out.stride(0),
            IGNORED=ignore_index,
            CAPPED=cap is not None,
            WITH_GRADIENT=gradient is not None,
            WEIGHTED=weight is not None,
            BV=block,
            num_warps=16 if block == 8192 else 4,
        )
    return nll
