"""One pass over the parts of a sum, whatever their strides.

Legend: B batch, T tokens, H heads, K key (or value) dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["write_sum"]


def write_sum(total: Tensor, terms: Sequence[Tensor]) -> None:
    """total <- the sum of at most two terms, rounded once; zero if there is none.

    A few heads of a tensor are rows with gaps between them, which PyTorch reads one value at a
    time; the Triton kernel reads sixteen bytes at a time, gaps or not.

    Args:
        total: [B, T, H, K], any strides. terms: like it; the first may be total itself.
    """
    tensors = [total, *terms]
    if terms and total.is_cuda and not all(x.is_contiguous() for x in tensors):
        from seqpar.ops.softmax_add_kernel import write_sum_triton

        if all(x.stride(-1) == 1 for x in tensors):
            return write_sum_triton(total, terms)
    if not terms:
        total.zero_()
        return
    if len(terms) == 2 and terms[0].dtype == terms[1].dtype == total.dtype:
        torch.add(*terms, out=total)
        return
    if terms[0] is not total:
        total.copy_(terms[0])
    for term in terms[1:]:
        total.add_(term)
