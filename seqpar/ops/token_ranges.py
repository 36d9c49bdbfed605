"""Ranges of a rank's tokens: cut out to be sent, and added back where they came from.

Legend: B batch, T tokens on this rank; a tensor is [B, T, ...].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar.layout import Span
from seqpar.ops.softmax_partial import RowSum

__all__ = ["add_ranges", "num_tokens", "room_for", "take_ranges"]


def num_tokens(ranges: Sequence[Span]) -> int:
    """How many tokens the ranges hold together."""
    return sum(span.num_tokens for span in ranges)


def room_for(count: int, like: Tensor) -> Tensor:
    """Unwritten memory for `count` tokens of a tensor like this."""
    return like.new_empty(like.shape[0], count, *like.shape[2:])


def take_ranges(x: Tensor, ranges: Sequence[Span]) -> Tensor:
    """The given ranges of x's tokens, end to end; a view if there is only one."""
    parts = [x[:, span.start : span.stop] for span in ranges]
    return parts[0] if len(parts) == 1 else torch.cat([x[:, :0], *parts], 1)


def add_ranges(
    total: RowSum, part: Tensor, ranges: Sequence[Span], *, is_lent: bool = False
) -> None:
    """Add what `take_ranges` would have cut out to where it would have been cut."""
    offset = 0
    for span in ranges:
        piece = part[:, offset : offset + span.num_tokens]
        total.add(piece, start=span.start, is_lent=is_lent)
        offset += span.num_tokens
