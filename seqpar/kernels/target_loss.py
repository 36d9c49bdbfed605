"""The loss of rows of logits against their targets, and its gradient, in one visit of each row.

Legend: T rows (tokens), V vocabulary.

    x = factor * logits, or cap * tanh(factor * logits / cap)
    nll = log(sum_v exp x_v) - x_target,    gradient = (softmax(x) - one-hot) * dx / dlogits

Memory bounds this: on CUDA a Triton kernel reads each row, reads it again from cache and writes
the gradient, which may take the logits' own place; elsewhere PyTorch's operations do the same in
more passes. Sums are float32 (float64 for float64), whatever the logits are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar.errors import KernelInputError

__all__ = ["target_loss"]


def target_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    gradient: Tensor | None = None,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    factor: float = 1.0,
    cap: float | None = None,
) -> Tensor:
    """-log softmax(x)[label] of every row, 0 where the label is `ignore_index`.

    Args:
        logits: [T, V], any floating dtype, the last dim dense.
        labels: int64 [T], in [0, V) or `ignore_index`.
        gradient: [T, V] of the logits' dtype to write the gradient of the sum of nll into; the
            logits themselves will do. Rows to ignore become zero.
        weight: 0-dim, float32 (float64 for float64); the gradient is of weight * sum of nll.
        factor: x = factor * logits.
        cap: if given, x = cap * tanh(factor * logits / cap).

    Returns:
        nll [T], float32 (float64 for float64 logits).

    Raises:
        KernelInputError: shapes or strides that do not fit together.
    """
    _check(logits, labels, gradient)
    if logits.is_cuda and logits.dtype != torch.float64:
        from seqpar.kernels.target_loss_kernel import target_loss_triton

        return target_loss_triton(
            logits,
            labels,
            gradient,
            weight=weight,
            ignore_index=ignore_index,
            factor=factor,
            cap=cap,
        )
    return _in_pytorch(logits, labels, gradient, weight, ignore_index, factor, cap)


def _in_pytorch(
    logits: Tensor,
    labels: Tensor,
    gradient: Tensor | None,
    weight: Tensor | None,
    ignore_index: int,
    factor: float,
    cap: float | None,
) -> Tensor:
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    x = logits if factor == 1.0 else logits.to(accumulate) * factor
    if cap is not None:
        x = cap * torch.tanh(x.to(accumulate) / cap)
    log_weights = torch.log_softmax(x, -1, dtype=accumulate)
    is_target = (labels != ignore_index)[:, None]
    index = labels.clamp(min=0)[:, None]
    chosen = log_weights.gather(-1, index)
    if gradient is not None:
        # expm1: p - 1 keeps its digits where p is nearly 1.
        slopes = log_weights.exp_().scatter_(-1, index, torch.expm1(chosen))
        if cap is not None:
            slopes.mul_(1 - (x / cap).square())
        if weight is not None:
            slopes.mul_(weight)
        gradient.copy_(slopes.mul_(factor).masked_fill_(~is_target, 0))
    return -torch.where(is_target, chosen, 0)[:, 0]


def _check(logits: Tensor, labels: Tensor, gradient: Tensor | None) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise KernelInputError(
            f"target_loss needs logits [T, V] and labels [T], got {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}"
        )
    for name, x in (("logits", logits), ("gradient", gradient)):
        if x is not None and (x.shape != logits.shape or x.stride(-1) != 1):
            raise KernelInputError(
                f"target_loss needs the {name} as dense rows of {tuple(logits.shape)}, got "
                f"{tuple(x.shape)} with strides {x.stride()}"
            )
    if gradient is not None and gradient.dtype != logits.dtype:
        raise KernelInputError(
            f"target_loss writes the gradient in the logits' {logits.dtype}, got {gradient.dtype}"
        )
