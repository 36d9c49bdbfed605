"""Softmax attention over a stream that is scattered over a group of ranks.

Legend: B batch, T tokens on this rank, H query heads, G key/value heads, K key dim, V value dim.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.layout import SequenceLayout
from seqpar.ops.ring import RingAttention
from seqpar.ops.ring_schedule import ring_schedule
from seqpar.ops.softmax_tiles import Mask

__all__ = ["softmax_attention"]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    group: ProcessGroup | None,
    strategy: str = "auto",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_layout: SequenceLayout | None = None,
    check: bool = True,
) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mask = Mask(causal=causal, window=window)
    schedule = ring_schedule(layout, key_layout or layout, comm.group_rank(group), mask)
    out: Tensor = RingAttention.apply(q, k, v, schedule, group, scale)  # type: ignore[no-untyped-call]
    return out
