"""Where each token of a packed batch lives: one frozen value that all else is derived from.

Words. A *document* is one training sequence. The *stream* is the documents packed end to end;
`cu_seqlens` are its bounds. A *span* is a contiguous [start, stop) of the stream held by one rank.
A *run* is the part of a span that belongs to one document: what a kernel sees as one sequence.
A rank's local tensor holds its spans one after the other, in stream order.

    documents   |---- 0 ----|- 1 -|------ 2 ------|        cu_seqlens = (0, 12, 18, 34)
    spans       |-- rank 0 --|-- rank 1 --|- rank 2 -|     runs of rank 0: [0, 12), [12, 13)

Shape letters: N tokens of the stream, T tokens of one rank, D documents, W ranks.
"""

from __future__ import annotations

import itertools
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.errors import LayoutError

__all__ = ["IGNORE_INDEX", "Link", "Run", "SequenceLayout", "Span"]

IGNORE_INDEX = -100
"""The label of a token that has no next token in its document (torch's cross-entropy default)."""


class Span(NamedTuple):
    """A contiguous range [start, stop) of stream positions."""

    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    def intersect(self, other: Span) -> Span:
        """The common part of two spans; empty (start == stop) if there is none."""
        start = max(self.start, other.start)
        return Span(start, max(start, min(self.stop, other.stop)))


class Run(NamedTuple):
    """The part of a rank's span that belongs to one document."""

    document: int
    start: int
    stop: int
    local_start: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start

    @property
    def local_stop(self) -> int:
        return self.local_start + self.stop - self.start


class Link(NamedTuple):
    """One span in the chain along which a recurrent state travels, in stream order.

    `carries_in`: its first token continues a document of the link before.
    `carries_out`: its last token's document goes on in the next link.
    `passes_through`: it lies inside one document, so what comes in also reaches what goes out.
    """

    rank: int
    span_index: int
    span: Span
    carries_in: bool
    carries_out: bool
    passes_through: bool


@dataclass(frozen=True)
class SequenceLayout:
    """Which rank of a group holds which tokens of one packed stream.

    Args:
        cu_seqlens: bounds of the documents, from 0 to N, strictly increasing (no empty document).
        spans: per rank, the spans that it holds, in stream order. Together they cover [0, N)
            once. A rank may hold nothing; shards may be uneven.

    Raises:
        LayoutError: bounds that do not start at 0 or do not increase, or spans that overlap,
            leave a gap, run backwards or leave the stream.
    """

    cu_seqlens: tuple[int, ...]
    spans: tuple[tuple[Span, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "cu_seqlens", _checked_bounds(self.cu_seqlens))
        object.__setattr__(self, "spans", _checked_spans(self.spans, self.num_tokens))

    @classmethod
    def contiguous(cls, cu_seqlens: Iterable[int] | Tensor, world_size: int) -> SequenceLayout:
        """Rank r holds the r-th of `world_size` nearly equal pieces of the stream."""
        bounds = _checked_bounds(cu_seqlens)
        cuts = _even_cuts(bounds[-1], _checked_world_size(world_size))
        return cls(bounds, tuple((Span(a, b),) for a, b in itertools.pairwise(cuts)))

    @classmethod
    def zigzag(cls, cu_seqlens: Iterable[int] | Tensor, world_size: int) -> SequenceLayout:
        """Rank r holds pieces r and 2W-1-r of 2W: causal work of one long document balances."""
        bounds = _checked_bounds(cu_seqlens)
        pieces = 2 * _checked_world_size(world_size)
        cuts = _even_cuts(bounds[-1], pieces)
        spans = [Span(a, b) for a, b in itertools.pairwise(cuts)]
        return cls(bounds, tuple((spans[r], spans[pieces - 1 - r]) for r in range(world_size)))

    @property
    def world_size(self) -> int:
        return len(self.spans)

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def num_documents(self) -> int:
        return len(self.cu_seqlens) - 1

    def tokens_on(self, rank: int) -> int:
        """How many tokens the rank holds."""
        return sum(span.num_tokens for span in self.spans[rank])

    # -- whole stream <-> one rank ------------------------------------------------------------

    def shard(self, stream: Tensor, rank: int, *, dim: int = 1) -> Tensor:
        """The rank's part of a tensor that has N tokens on `dim`; a new, contiguous tensor."""
        self.check_tokens(stream, dim=dim, expected=self.num_tokens, what="stream tensor")
        parts = [stream.narrow(dim, span.start, span.num_tokens) for span in self.spans[rank]]
        return torch.cat(parts, dim) if parts else stream.narrow(dim, 0, 0).clone()

    def unshard(self, shards: Sequence[Tensor], *, dim: int = 1) -> Tensor:
        """The inverse of `shard`: the stream tensor from every rank's part, in rank order."""
        if len(shards) != self.world_size:
            raise LayoutError(f"unshard takes one tensor a rank: {self.world_size}, {len(shards)=}")
        parts: list[tuple[int, Tensor]] = []
        for rank, local in enumerate(shards):
            self.check_tokens(local, dim=dim, expected=self.tokens_on(rank), what=f"shard {rank}")
            for span, offset in zip(self.spans[rank], self.local_offsets(rank), strict=True):
                parts.append((span.start, local.narrow(dim, offset, span.num_tokens)))
        parts.sort(key=lambda part: part[0])
        return torch.cat([part for _, part in parts], dim) if parts else shards[0].clone()

    def check_tokens(self, tensor: Tensor, *, dim: int, expected: int, what: str) -> None:
        """Raise LayoutError unless the tensor has the expected number of tokens on `dim`."""
        if not -tensor.ndim <= dim < tensor.ndim or tensor.shape[dim] != expected:
            raise LayoutError(
                f"{what} has shape {tuple(tensor.shape)}, but the layout gives it {expected} "
                f"tokens on dim {dim}: shard it with this layout first"
            )

    # -- what a rank's local tensor holds -----------------------------------------------------

    def local_offsets(self, rank: int) -> tuple[int, ...]:
        """Where each of the rank's spans begins in its local tensor."""
        offsets, total = [], 0
        for span in self.spans[rank]:
            offsets.append(total)
            total += span.num_tokens
        return tuple(offsets)

    def runs(self, rank: int) -> tuple[Run, ...]:
        """The rank's documents' parts in local order; together they tile its local tensor."""
        return self._runs[rank]

    def stream_positions(self, rank: int) -> Tensor:
        """int64 [T]: the stream position of each local token."""
        parts = [torch.arange(span.start, span.stop) for span in self.spans[rank]]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def position_ids(self, rank: int) -> Tensor:
        """int64 [T]: each local token's position within its document, from 0."""
        starts = [(run.start - self.cu_seqlens[run.document], run) for run in self.runs(rank)]
        parts = [torch.arange(first, first + run.num_tokens) for first, run in starts]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def document_ids(self, rank: int) -> Tensor:
        """int64 [T]: the index of each local token's document."""
        runs = self.runs(rank)
        documents = torch.tensor([run.document for run in runs], dtype=torch.int64)
        return documents.repeat_interleave(
            torch.tensor([r.num_tokens for r in runs], dtype=torch.int64)
        )

    def local_cu_seqlens(self, rank: int) -> Tensor:
        """int32 [runs + 1]: bounds of the rank's runs in its local tensor."""
        bounds = [run.local_start for run in self.runs(rank)] + [self.tokens_on(rank)]
        return torch.tensor(bounds, dtype=torch.int32)

    def next_token_labels(self, ids: Tensor, *, dim: int = 1) -> Tensor:
        """Labels of the whole stream, shifted before sharding; a document's last is ignored."""
        self.check_tokens(ids, dim=dim, expected=self.num_tokens, what="token ids")
        labels = ids.roll(-1, dim)
        last = torch.tensor(self.cu_seqlens[1:], dtype=torch.int64, device=ids.device) - 1
        return labels.index_fill(dim, last, IGNORE_INDEX)

    # -- what spans owe each other ------------------------------------------------------------

    @cached_property
    def chain(self) -> tuple[Link, ...]:
        """Every non-empty span in stream order, with how a recurrent state passes through it."""
        ordered = sorted(
            (span, rank, index)
            for rank, spans in enumerate(self.spans)
            for index, span in enumerate(spans)
            if span.num_tokens
        )
        return tuple(
            Link(
                rank=rank,
                span_index=index,
                span=span,
                carries_in=self._document_start(span.start) < span.start,
                carries_out=self._document_stop(span.stop - 1) > span.stop,
                passes_through=self._document_start(span.stop - 1) <= span.start,
            )
            for span, rank, index in ordered
        )

    def visible_keys(self, span: Span, *, causal: bool, window: int | None = None) -> Span:
        """The smallest range that holds every key that some query of the span may see.

        `window` counts the query itself: a query at position p sees keys p-window+1 .. p, and
        if not causal also p .. p+window-1, within its document.
        """
        if not span.num_tokens:
            return span
        start, stop = self._document_start(span.start), self._document_stop(span.stop - 1)
        if window is not None:
            start = max(start, span.start - window + 1)
            stop = min(stop, span.stop + window - 1)
        return Span(start, span.stop if causal else stop)

    def halo(self, span: Span, width: int) -> Span:
        """The up to `width` tokens left of the span that belong to its first token's document."""
        if not span.num_tokens:
            return Span(span.start, span.start)
        return Span(max(self._document_start(span.start), span.start - width), span.start)

    def owners(self, wanted: Span) -> tuple[tuple[int, Span], ...]:
        """(rank, part) for each piece of a stream range, in stream order."""
        found = []
        position = bisect_right(self._link_stops, wanted.start)
        while position < len(self.chain) and self.chain[position].span.start < wanted.stop:
            link = self.chain[position]
            found.append((link.rank, link.span.intersect(wanted)))
            position += 1
        return tuple(found)

    def local_index(self, rank: int, position: int) -> int:
        """Where a stream position that the rank holds stands in its local tensor."""
        for span, offset in zip(self.spans[rank], self.local_offsets(rank), strict=True):
            if span.start <= position < span.stop:
                return offset + position - span.start
        raise LayoutError(f"rank {rank} does not hold position {position}: {self.spans[rank]=}")

    # -- private ------------------------------------------------------------------------------

    @cached_property
    def _link_stops(self) -> list[int]:
        return [link.span.stop for link in self.chain]

    @cached_property
    def _runs(self) -> tuple[tuple[Run, ...], ...]:
        return tuple(tuple(self._runs_of(rank)) for rank in range(self.world_size))

    def _runs_of(self, rank: int) -> Iterable[Run]:
        for span, offset in zip(self.spans[rank], self.local_offsets(rank), strict=True):
            start = span.start
            while start < span.stop:
                document = self._document_of(start)
                stop = min(span.stop, self.cu_seqlens[document + 1])
                yield Run(document, start, stop, offset + start - span.start)
                start = stop

    def _document_of(self, position: int) -> int:
        return bisect_right(self.cu_seqlens, position) - 1

    def _document_start(self, position: int) -> int:
        return self.cu_seqlens[self._document_of(position)]

    def _document_stop(self, position: int) -> int:
        return self.cu_seqlens[bisect_left(self.cu_seqlens, position + 1)]


def _checked_world_size(world_size: int) -> int:
    (world_size,) = _integers((world_size,), "world_size")
    if world_size < 1:
        raise LayoutError(f"a layout needs at least 1 rank, got world_size={world_size}")
    return world_size


def _integers(values: Iterable[int], what: str) -> tuple[int, ...]:
    """Whole numbers as ints, whatever holds them; fractions are not cut to some."""
    try:
        return tuple(map(operator.index, values))
    except TypeError as error:
        raise LayoutError(f"{what} must be whole numbers, got {values!r:.200}") from error


def _checked_bounds(cu_seqlens: Iterable[int] | Tensor) -> tuple[int, ...]:
    values = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else cu_seqlens
    bounds = _integers(values, "cu_seqlens")
    if not bounds or bounds[0] != 0:
        raise LayoutError(f"cu_seqlens must start at 0, got {bounds[:4]}...")
    for document, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop == start:
            raise LayoutError(f"document {document} has no token (at {start}): leave it out")
        if stop < start:
            raise LayoutError(f"cu_seqlens must increase, document {document} has {start}:{stop}")
    return bounds


def _checked_spans(
    spans: Iterable[Iterable[tuple[int, int]]], num_tokens: int
) -> tuple[tuple[Span, ...], ...]:
    """Per rank: spans without the empty ones, adjacent ones joined; they must tile the stream."""
    by_rank = tuple(
        _joined(Span(*_integers(span, "a span's bounds")) for span in of_rank) for of_rank in spans
    )
    _checked_world_size(len(by_rank))
    position = 0
    for span in sorted(span for of_rank in by_rank for span in of_rank):
        if span.start != position:
            kind = "overlap" if span.start < position else "leave a gap"
            raise LayoutError(f"spans {kind} at token {min(position, span.start)} (next: {span})")
        position = span.stop
    if position != num_tokens:
        raise LayoutError(f"spans end at token {position}, but the stream has {num_tokens}")
    return by_rank


def _joined(spans: Iterable[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for span in spans:
        if span.stop < span.start or (joined and span.start < joined[-1].stop):
            raise LayoutError(f"a rank's spans must run forward in stream order, got {span}")
        if joined and span.start == joined[-1].stop:
            joined[-1] = Span(joined[-1].start, span.stop)
        elif span.num_tokens:
            joined.append(span)
    return tuple(joined)


def _even_cuts(num_tokens: int, pieces: int) -> list[int]:
    return [num_tokens * i // pieces for i in range(pieces + 1)]
