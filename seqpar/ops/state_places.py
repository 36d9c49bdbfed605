"""Where links, runs and documents stand in one rank's tensors: all integers, no tensor data.

A run is the part of a document in one span. Runs are numbered in local order, links in the order
of the stream over all ranks.
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import torch
from torch import Tensor

from seqpar.layout import SequenceLayout
from seqpar.ops.state_chain import StateChain

__all__ = ["RankPlaces", "places_of"]


@lru_cache(maxsize=256)
def places_of(layout: SequenceLayout, rank: int) -> RankPlaces:
    """The places of a rank; made once for the layers that share a layout."""
    return RankPlaces(layout, rank)


class RankPlaces:
    """What `RankPart` looks up; a pure function of layout and rank."""

    def __init__(self, layout: SequenceLayout, rank: int) -> None:
        self._layout, self._rank = layout, rank
        self.chain = StateChain.of(layout)
        self.reversed_chain = self.chain.reversed()
        self.links = self.chain.links_of(rank)
        self.runs = layout.runs(rank)
        self.num_runs = len(self.runs)
        self._bounds: dict[int, Tensor] = {}

    @cached_property
    def link_tokens(self) -> list[int]:
        """Tokens of each of the rank's links."""
        return [self.chain.links[link].num_tokens for link in self.links]

    def mirror(self, link: int) -> int:
        """The link's index in the reversed chain, and back."""
        return len(self.chain.links) - 1 - link

    @cached_property
    def first_run(self) -> dict[int, int]:
        """By link: the run that a state enters."""
        starts = {run.start: index for index, run in enumerate(self.runs)}
        return {link: starts[self._layout.chain[link].span.start] for link in self.links}

    @cached_property
    def last_run(self) -> dict[int, int]:
        """By link: the run that a state leaves."""
        stops = {run.stop: index for index, run in enumerate(self.runs)}
        return {link: stops[self._layout.chain[link].span.stop] for link in self.links}

    def tokens_of_run(self, run: int) -> slice:
        """The run's tokens in the local tensor."""
        return slice(self.runs[run].local_start, self.runs[run].local_stop)

    @cached_property
    def ending_runs(self) -> list[tuple[int, int]]:
        """(run, document) for each document whose last token is here."""
        bounds = self._layout.cu_seqlens
        return [
            (index, run.document)
            for index, run in enumerate(self.runs)
            if run.stop == bounds[run.document + 1]
        ]

    @cached_property
    def ending_document(self) -> dict[int, int]:
        """By run: the document that ends with it."""
        return dict(self.ending_runs)

    @cached_property
    def initial_passes(self) -> bool:
        """Whether the first document goes on beyond the first link."""
        first = self._layout.chain[0]
        return first.passes_through and first.carries_out

    def sequence_bounds(self, batch: int) -> Tensor:
        """int32 [B*R + 1] on the CPU: the runs of every row, the rows laid end to end."""
        if batch not in self._bounds:
            local = self._layout.local_cu_seqlens(self._rank)
            tokens = self._layout.tokens_on(self._rank)
            rows = torch.arange(batch, dtype=torch.int32)[:, None] * tokens
            end = torch.tensor([batch * tokens], dtype=torch.int32)
            self._bounds[batch] = torch.cat([(rows + local[None, :-1]).flatten(), end])
        return self._bounds[batch]
