"""Fold partial softmax outputs and their log-sum-exps into one, in float32.

Legend: B batch, T tokens, H heads, V value dim.

    lse = log(exp(lse_a) + exp(lse_b)),    out = exp(lse_a - lse) out_a + exp(lse_b - lse) out_b

A row that saw no key has lse = -inf; it adds nothing, whatever its out holds, and two such rows
give out = 0, lse = -inf.
"""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar.errors import KernelInputError
from seqpar.kernels.on_device import on_device
from seqpar.kernels.tensors import check_dense, check_tensors

__all__ = ["merge_lse"]


def merge_lse(out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial results of softmax attention over disjoint keys. Not differentiable.

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
    _check(out=out, lse=lse, new_out=new_out, new_lse=new_lse)
    with torch.no_grad():
        if out.is_cuda and out.numel() > 0:
            from seqpar.kernels.merge_lse_triton import merge_lse_triton

            with on_device(out.device):
                return merge_lse_triton(out, lse, new_out, new_lse)
        return _merge_lse_torch(out, lse, new_out, new_lse)


def _merge_lse_torch(
    out: Tensor, lse: Tensor, new_out: Tensor, new_lse: Tensor
) -> tuple[Tensor, Tensor]:
    top = torch.maximum(lse, new_lse)
    low = torch.minimum(lse, new_lse)
    merged = torch.where(torch.isneginf(low), top, top + torch.log1p(torch.exp(low - top)))
    total = _weighted(out, lse, merged).add_(_weighted(new_out.float(), new_lse, merged))
    return total, merged


def _weighted(out: Tensor, lse: Tensor, merged: Tensor) -> Tensor:
    """exp(lse - merged) out, and 0 where no key was seen."""
    empty = torch.isneginf(lse)[..., None]
    return (out * torch.exp(lse - merged)[..., None]).masked_fill_(empty, 0.0)


def _check(**given: Tensor) -> None:
    check_tensors(**given)
    out, lse, new_out, new_lse = given.values()
    if out.shape != new_out.shape or lse.shape != new_lse.shape or out.shape[:-1] != lse.shape:
        shapes = {name: tuple(x.shape) for name, x in given.items()}
        raise KernelInputError(
            f"merge_lse needs [B, T, H, V], [B, T, H], twice alike; got {shapes}"
        )
    for name, x in given.items():
        fits = x.is_floating_point() if name == "new_out" else x.dtype == torch.float32
        if not fits:
            wanted = "a floating dtype" if name == "new_out" else "float32"
            raise KernelInputError(f"merge_lse takes {name} in {wanted}, got {x.dtype}: cast it")
        check_dense(name, x.layout)
        if x.device != out.device:
            raise KernelInputError(
                f"merge_lse needs its four tensors on one device, {name} is on {x.device} and out "
                f"on {out.device}; move one"
            )
