"""Fold one partial softmax output into another, in place.

Legend: B batch, T tokens, H heads, V value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_lse_", "merge_lse_torch_"]


def merge_lse_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """out, lse <- the two merged; arithmetic in lse's dtype, one rounding into out's dtype.

        lse' = log(exp(lse) + exp(new_lse))
        out' = exp(lse - lse') out + exp(new_lse - lse') new_out

    A row that saw no key has lse = -inf and counts for nothing; two such rows give 0 and -inf.

    Args:
        out: [B, T, H, V], any floating dtype, any strides; overwritten.
        lse: [B, T, H] float32 (float64 with float64), natural logarithm; overwritten.
        new_out: [B, T, H, V], any floating dtype.
        new_lse: [B, T, H] of lse's dtype.

    Source: Milakov and Gimelshein, arXiv 1805.02867; the log1p form keeps small differences.
    """
    if out.is_cuda and lse.dtype == torch.float32 and out.stride(-1) == new_out.stride(-1) == 1:
        from seqpar.ops.softmax_merge_kernel import merge_lse_triton_

        return merge_lse_triton_(out, lse, new_out, new_lse)
    return merge_lse_torch_(out, lse, new_out, new_lse)


def merge_lse_torch_(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    """`merge_lse_` in plain PyTorch: any device, any strides, float64 too."""
    top, low = torch.maximum(lse, new_lse), torch.minimum(lse, new_lse)
    merged = torch.where(torch.isneginf(low), top, top + torch.log1p(torch.exp(low - top)))
    weight, new_weight = _weight(lse, merged), _weight(new_lse, merged)
    wide = out.to(lse.dtype) * weight + new_out.to(lse.dtype) * new_weight
    out.copy_(wide)
    lse.copy_(merged)


def _weight(lse: Tensor, merged: Tensor) -> Tensor:
    return torch.where(torch.isneginf(lse), 0.0, torch.exp(lse - merged))[..., None]
