"""Layouts whose ranks have equal work: as few documents cut as that takes.

`SequenceLayout.zigzag` cuts the stream, which balances causal attention over one long document.
Over packed documents its halves fall on documents of different lengths, and the work does not
balance. Here documents are dealt out whole, and only those too long for that are cut, each in a
zigzag of its own; a document that is not cut needs no communication at all.

    document lengths   40 6 5 3 2         two ranks
    cut                40                 rank 0: 0..10 and 30..40    rank 1: 10..30
    dealt out whole    6 5 3 2            rank 0: 6, 2                rank 1: 5, 3

Under a sliding window work hardly grows along a document, and each cut costs a halo: there the
stream is cut into one span a rank if such spans balance.

Words as in layout.py: N tokens of the stream, D documents, W ranks.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from seqpar.errors import LayoutError
from seqpar.layout import SequenceLayout, Span

__all__ = ["balanced_layout", "causal_work", "imbalance"]


def balanced_layout(
    cu_seqlens: Iterable[int] | Tensor,
    world_size: int,
    *,
    window: int | None = None,
    attention_share: float = 0.5,
    tolerance: float = 0.03,
) -> SequenceLayout:
    """A layout in which no rank has more than (1 + tolerance) of the mean work or tokens.

    Of the candidates (under a window one span a rank; cut documents above N / W tokens, above half
    of that, and so on) the first that meets the tolerance is taken, else the best; so documents are
    cut only as far as balance asks for it. Documents of fewer than 2 W tokens are never cut.

    Args:
        cu_seqlens: bounds of the documents, from 0 to N, strictly increasing.
        world_size: W.
        window: of causal attention, as in `softmax_attention`: how many keys a query sees at most.
        attention_share: how much of a rank's time goes to attention, the rest being the same for
            every token. One span a rank under a window has more tokens where queries see fewer
            keys; attention by itself takes about 0.95. Other layouts have equal work and tokens.
        tolerance: the largest excess over the mean of causal attention work, and of tokens.

    Raises:
        LayoutError: bounds or a world size that `SequenceLayout` refuses, a window under 1, or a
            share that is none.
    """
    if window is not None and window < 1:
        raise LayoutError(f"window={window}: it counts the query itself, so it is at least 1")
    if not 0 <= attention_share <= 1:
        raise LayoutError(f"attention_share is a share, from 0 to 1; got {attention_share}")
    bounds = SequenceLayout.contiguous(cu_seqlens, world_size).cu_seqlens
    best: tuple[float, SequenceLayout] | None = None
    for layout in _candidates(bounds, world_size, window, attention_share):
        excess = max(imbalance(layout, window=window), _token_imbalance(layout))
        if best is None or excess < best[0]:
            best = excess, layout
        if excess <= tolerance:
            break
    assert best is not None
    return best[1]


def causal_work(layout: SequenceLayout, *, window: int | None = None) -> tuple[int, ...]:
    """By rank: (query, key) pairs of causal attention within documents."""
    return tuple(
        sum(
            _pairs(run.start - layout.cu_seqlens[run.document], run.num_tokens, window)
            for run in layout.runs(rank)
        )
        for rank in range(layout.world_size)
    )


def imbalance(layout: SequenceLayout, *, window: int | None = None) -> float:
    """How far the busiest rank's causal work lies above the mean: 0.03 is 3%."""
    return _excess(causal_work(layout, window=window))


def _candidates(
    bounds: tuple[int, ...], world_size: int, window: int | None, attention_share: float
) -> Iterator[SequenceLayout]:
    if window is not None and bounds[-1]:
        yield _one_span_a_rank(bounds, world_size, window, attention_share)
        yield SequenceLayout.contiguous(bounds, world_size)
    limit = bounds[-1] // world_size
    while True:
        yield _with_cuts_above(bounds, world_size, max(limit, 2 * world_size - 1), window)
        if limit < 2 * world_size:
            return
        limit //= 2


def _one_span_a_rank(
    bounds: tuple[int, ...], world_size: int, window: int, attention_share: float
) -> SequenceLayout:
    """Contiguous spans of equal load: of work and of tokens, each as a share of the whole."""
    of_documents = [_pairs(0, stop - start, window) for start, stop in itertools.pairwise(bounds)]
    before = list(itertools.accumulate(of_documents, initial=0))
    num_tokens = bounds[-1]

    def load(position: int) -> float:
        """Of the stream up to a position; 1 for all of it."""
        document = min(bisect_right(bounds, position), len(bounds) - 1) - 1
        work = before[document] + _pairs(0, position - bounds[document], window)
        share_of_work, share_of_tokens = work / before[-1], position / num_tokens
        return attention_share * share_of_work + (1 - attention_share) * share_of_tokens

    positions = range(num_tokens + 1)
    cuts = [bisect_left(positions, i / world_size, key=load) for i in range(1, world_size)]
    spans = [Span(start, stop) for start, stop in itertools.pairwise([0, *cuts, num_tokens])]
    return SequenceLayout(bounds, tuple((span,) for span in spans))


@dataclass
class _Load:
    """What a rank has been given so far, as shares of the whole."""

    work: float = 0.0
    tokens: float = 0.0
    spans: list[Span] = field(default_factory=list)


def _with_cuts_above(
    bounds: tuple[int, ...], world_size: int, limit: int, window: int | None
) -> SequenceLayout:
    """Documents above the limit in a zigzag each, the others dealt out whole, long ones first."""
    loads = [_Load() for _ in range(world_size)]
    documents = [Span(start, stop) for start, stop in itertools.pairwise(bounds)]
    total_work = sum(_pairs(0, document.num_tokens, window) for document in documents)
    for document in sorted(documents, key=lambda span: (-span.num_tokens, span.start)):
        work = _pairs(0, document.num_tokens, window) / total_work
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


def _pairs(first: int, num_queries: int, window: int | None) -> int:
    """Keys seen by causal queries at positions first .. first + num_queries - 1."""
    return _seen(first + num_queries, window) - _seen(first, window)


def _seen(length: int, window: int | None) -> int:
    """Pairs of a document of so many tokens."""
    growing = length if window is None else min(length, window)
    return growing * (growing + 1) // 2 + (length - growing) * growing


def _token_imbalance(layout: SequenceLayout) -> float:
    return _excess(tuple(layout.tokens_on(rank) for rank in range(layout.world_size)))


def _excess(shares: tuple[int, ...]) -> float:
    total = sum(shares)
    return max(shares) * len(shares) / total - 1 if total else 0.0
