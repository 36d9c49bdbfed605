"""Layouts whose ranks have equal work: as few documents cut as that takes.

`SequenceLayout.zigzag` cuts the stream, which balances causal attention over one long document.
Over packed documents its halves fall on documents of different lengths, and the work does not
balance. Here documents are dealt out whole, and only those too long for that are cut, each in a
zigzag of its own; a document that is not cut needs no communication at all.

    document lengths   40 6 5 3 2         two ranks
    cut                40                 rank 0: 0..10 and 30..40    rank 1: 10..30
    dealt out whole    6 5 3 2            rank 0: 6, 2                rank 1: 5, 3

Words as in layout.py: N tokens of the stream, D documents, W ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import Tensor

from seqpar.layout import SequenceLayout, Span

__all__ = ["balanced_layout", "causal_work", "imbalance"]


def balanced_layout(
    cu_seqlens: Iterable[int] | Tensor, world_size: int, *, tolerance: float = 0.03
) -> SequenceLayout:
    """A layout in which no rank has more than (1 + tolerance) of the mean work or tokens.

    Of the candidates (cut documents above N / W tokens, above half of that, and so on) the first
    that meets the tolerance is taken, else the best; so documents are cut only as far as balance
    asks for it. Documents of fewer than 2 W tokens are never cut.

    Args:
        cu_seqlens: bounds of the documents, from 0 to N, strictly increasing.
        world_size: W.
        tolerance: the largest excess over the mean of causal attention work, and of tokens.

    Raises:
        LayoutError: bounds or a world size that `SequenceLayout` refuses.
    """
    whole = SequenceLayout.contiguous(cu_seqlens, world_size)
    bounds, limit = whole.cu_seqlens, whole.num_tokens // world_size
    best: tuple[float, SequenceLayout] | None = None
    while True:
        layout = _with_cuts_above(bounds, world_size, max(limit, 2 * world_size - 1))
        excess = max(imbalance(layout), _token_imbalance(layout))
        if best is None or excess < best[0]:
            best = excess, layout
        if excess <= tolerance or limit < 2 * world_size:
            return best[1]
        limit //= 2


def causal_work(layout: SequenceLayout) -> tuple[int, ...]:
    """By rank: (query, key) pairs of causal attention within documents."""
    return tuple(
        sum(
            _pairs(run.start - layout.cu_seqlens[run.document], run.num_tokens)
            for run in layout.runs(rank)
        )
        for rank in range(layout.world_size)
    )


def imbalance(layout: SequenceLayout) -> float:
    """How far the busiest rank's causal work lies above the mean: 0.03 is 3%."""
    return _excess(causal_work(layout))


@dataclass
class _Load:
    """What a rank has been given so far, as shares of the whole."""

    work: float = 0.0
    tokens: float = 0.0
    spans: list[Span] = field(default_factory=list)


def _with_cuts_above(bounds: tuple[int, ...], world_size: int, limit: int) -> SequenceLayout:
    loads = [_Load() for _ in range(world_size)]
    documents = [Span(start, stop) for start, stop in itertools.pairwise(bounds)]
    total_work = sum(_pairs(0, document.num_tokens) for document in documents)
    for document in sorted(documents, key=lambda span: (-span.num_tokens, span.start)):
        work = _pairs(0, document.num_tokens) / total_work
        tokens = document.num_tokens / bounds[-1]
        if document.num_tokens > limit:
            for rank, load in enumerate(loads):
                load.spans += _zigzag(document, world_size, rank)
                load.work += work / world_size
                load.tokens += tokens / world_size
        else:
            load = min(loads, key=lambda load: max(load.work + work, load.tokens + tokens))
            load.spans.append(document)
            load.work, load.tokens = load.work + work, load.tokens + tokens
    return SequenceLayout(bounds, tuple(tuple(sorted(load.spans)) for load in loads))


def _zigzag(document: Span, world_size: int, rank: int) -> tuple[Span, Span]:
    pieces = 2 * world_size

    def piece(index: int) -> Span:
        cuts = (document.num_tokens * i // pieces for i in (index, index + 1))
        start, stop = (document.start + cut for cut in cuts)
        return Span(start, stop)

    return piece(rank), piece(pieces - 1 - rank)


def _pairs(first: int, num_queries: int) -> int:
    """Keys seen by causal queries at positions first .. first + num_queries - 1."""
    return num_queries * first + num_queries * (num_queries + 1) // 2


def _token_imbalance(layout: SequenceLayout) -> float:
    return _excess(tuple(layout.tokens_on(rank) for rank in range(layout.world_size)))


def _excess(shares: tuple[int, ...]) -> float:
    total = sum(shares)
    return max(shares) * len(shares) / total - 1 if total else 0.0
