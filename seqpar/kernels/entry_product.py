"""Add what a state contributes to tokens, only where it has not decayed away.

Legend: B batch, T tokens, H heads, X the dim that is summed over, Y the dim of the result.

    out[b, t, h] += exp(g_h n_t) x[b, t, h] @ matrix[b, h]     where g_h n_t >= log(2^-24)

n_t = t + 1 steps from a state that enters before the first token, or T - 1 - t steps to one that
leaves after the last. Tokens beyond are neither read nor written, so the cost is that of the
tokens that a state reaches, not of the sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqpar.kernels.lightning.inputs import LOWEST_LOG_DECAY
from seqpar.kernels.recorder import not_recorded

__all__ = ["LOG_FLOOR", "add_entry_product", "reached_tokens"]

LOG_FLOOR = -16.635532
"""log(2^-24): what decays to less cannot change a float32 sum of its own size."""

_BLOCK_T = 64
_BLOCK_Y = 64


def reached_tokens(log_decay: float, num_tokens: int) -> int:
    """How many of the tokens a state reaches, one step after another."""
    if log_decay * num_tokens >= LOG_FLOOR:
        return num_tokens
    return int(LOG_FLOOR / log_decay)


def add_entry_product(
    out: Tensor,
    x: Tensor,
    matrix: Tensor,
    *,
    log_decay: Tensor,
    on_host: tuple[float, ...],
    from_end: bool,
) -> None:
    """Add in place; products in float32 (tf32 on CUDA for half inputs), the sum in out's dtype.

    Args:
        out: [B, T, H, Y], any strides.
        x: [B, T, H, X], any strides.
        matrix: [B, H, X, Y] float32, any strides.
        log_decay: [H] float32, fixed natural log decay <= 0 of each head, on x's device.
        on_host: the same numbers, not under -100; the launch needs them without waiting for the
            device.
        from_end: count steps to the end, from 0, instead of from the start, from 1.
    """
    tokens = x.shape[1]
    # From the end the last token is 0 steps away, so one token more is reached.
    extra = 1 if from_end else 0
    reached = [min(tokens, reached_tokens(g, tokens) + extra) for g in on_host]
    if x.is_cuda:
        _launch(out, x, matrix, log_decay, max(reached), from_end)
        return
    for head, (g, count) in enumerate(zip(on_host, reached, strict=True)):
        start = tokens - count if from_end else 0
        steps = torch.arange(count, dtype=matrix.dtype, device=x.device)
        steps = steps.flip(0) if from_end else steps + 1
        part = x[:, start : start + count, head].to(matrix.dtype)
        product = torch.matmul(part, matrix[:, head]) * (g * steps).exp()[:, None]
        target = out[:, start : start + count, head]
        target.copy_(target.to(matrix.dtype) + product)


def _launch(
    out: Tensor,
    x: Tensor,
    matrix: Tensor,
    log_decay: Tensor,
    reached: int,
    from_end: bool,
) -> None:
    import triton

    from seqpar.kernels.entry_product_kernel import entry_product_kernel

    batch, tokens, heads, inner = x.shape
    width = out.shape[-1]
    grid = (triton.cdiv(reached, _BLOCK_T), triton.cdiv(width, _BLOCK_Y), batch * heads)
    kernel: Any = entry_product_kernel
    not_recorded("add_entry_product is launched through Triton")
    kernel[grid](
        out,
        x,
        matrix,
        log_decay.float().contiguous(),
        tokens,
        heads,
        inner,
        width,
        *out.stride(),
        *x.stride(),
        *matrix.stride(),
        LOG_FLOOR=LOG_FLOOR,
        LOWEST=LOWEST_LOG_DECAY,
        FROM_END=from_end,
        IEEE=x.dtype == torch.float32,
        BLOCK_T=_BLOCK_T,
        BLOCK_X=max(16, triton.next_power_of_2(inner)),
        BLOCK_Y=_BLOCK_Y,
        num_warps=4,
    )
