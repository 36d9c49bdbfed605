"""Fold partial softmax outputs and their log-sum-exps into one, in float32.

Legend: B batch, T tokens, H heads, V value dim.

    lse = log(exp(lse_a) + exp(lse_b)),    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

A row that saw no key has lse = -inf; it adds nothing, and two such rows give out = 0, lse = -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar.errors import KernelInputError

__all__ = ["merge_lse"]


def merge_lse(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial results of softmax attention over disjoint keys.

    Args:
        out: [B, T, H, V] float32, what is merged so far.
        lse: [B, T, H] float32, natural logarithm.
        new_out: [B, T, H, V] in any floating dtype.
        new_lse: [B, T, H] float32.

    Returns:
        The merged out [B, T, H, V] and lse [B, T, H], new float32 tensors; (out, lse) is kept.

    Raises:
        KernelInputError: shapes, dtypes or devices that do not fit together.

    Source: Milakov and Gimelshein, arXiv 1805.02867; the log1p form keeps small differences.
    """
    _check(out, lse, new_out, new_lse)
    if out.is_cuda:
        from seqpar.kernels.merge_lse_triton import merge_lse_triton

        return merge_lse_triton(out, lse, new_out, new_lse)
    top = torch.maximum(lse, new_lse)
    low = torch.minimum(lse, new_lse)
    merged = torch.where(torch.isneginf(low), top, top + torch.log1p(torch.exp(low - top)))
    weight, new_weight = _weight(lse, merged), _weight(new_lse, merged)
    return out.mul(weight).add_(new_out.float() * new_weight), merged


def _weight(lse: Tensor, merged: Tensor) -> Tensor:
    return torch.where(torch.isneginf(lse), 0.0, torch.exp(lse - merged))[..., None]


def _check(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> None:
    if out.shape != new_out.shape or lse.shape != new_lse.shape or out.shape[:-1] != lse.shape:
        shapes = [tuple(x.shape) for x in (out, lse, new_out, new_lse)]
        raise KernelInputError(
            f"merge_lse needs [B, T, H, V], [B, T, H], twice alike; got {shapes}"
        )
    for name, tensor in (("out", out), ("lse", lse), ("new_lse", new_lse)):
        if tensor.dtype != torch.float32:
            raise KernelInputError(f"merge_lse keeps {name} in float32, got {tensor.dtype}")
    if len({x.device for x in (out, lse, new_out, new_lse)}) > 1:
        raise KernelInputError("merge_lse needs its four tensors on one device")
