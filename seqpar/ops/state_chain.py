"""The chain along which recurrent states travel.

Legend: B batch, H heads, K key dim, V value dim, W ranks. A link is a non-empty span of the stream.

Every link l maps what enters it to what leaves it, X_l = S_l + exp(G_l) E_l, and E_l = X_(l-1)
where a document goes on from link l-1 to link l, else nothing. Backward in time the same holds for
gradients, with the chain reversed: `StateChain.reversed()`.

"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from seqpar.layout import SequenceLayout

__all__ = ["ChainLink", "LinkState", "StateChain", "decayed"]


@dataclass(frozen=True)
class ChainLink:
    """One non-empty span of one rank, as the states see it."""

    rank: int
    slot: int
    """Which of its rank's links this is, in stream order."""
    num_tokens: int
    takes: bool
    """A state enters: its first token continues a document of the link before."""
    passes: bool
    """What enters also reaches the link after: it lies inside one document, ends excluded."""
    gives: bool
    """Its state enters the link after."""


@dataclass(frozen=True)
class StateChain:
    """The links in the order in which states travel, forward or backward in time."""

    links: tuple[ChainLink, ...]
    world_size: int

    @classmethod
    def of(cls, layout: SequenceLayout) -> StateChain:
        """The chain of a layout, forward in time."""
        seen = [0] * layout.world_size
        links = []
        for link in layout.chain:
            passes = link.passes_through and link.carries_in and link.carries_out
            slot, seen[link.rank] = seen[link.rank], seen[link.rank] + 1
            tokens = link.span.num_tokens
            links.append(
                ChainLink(link.rank, slot, tokens, link.carries_in, passes, link.carries_out)
            )
        return cls(tuple(links), layout.world_size)

    def reversed(self) -> StateChain:
        """The chain of the gradients: what took now gives."""
        links = tuple(
            ChainLink(x.rank, x.slot, x.num_tokens, x.gives, x.passes, x.takes)
            for x in reversed(self.links)
        )
        return StateChain(links, self.world_size)

    def links_of(self, rank: int) -> list[int]:
        """The rank's links by their index in this chain, in chain order."""
        return self._links_by_rank.get(rank, [])

    @cached_property
    def _links_by_rank(self) -> dict[int, list[int]]:
        found: dict[int, list[int]] = {}
        for index, link in enumerate(self.links):
            found.setdefault(link.rank, []).append(index)
        return found

    @cached_property
    def longest_reach(self) -> int:
        """The most links that one state travels: 0 if no document goes on beyond its link."""
        longest = reach = 0
        for before, link in itertools.pairwise(self.links):
            reach = (reach + 1 if before.passes else 1) if link.takes else 0
            longest = max(longest, reach)
        return longest

    @cached_property
    def most_givers(self) -> int:
        """M: the most giving links on one rank; at least 1."""
        return max(1, *self._givers_by_rank) if self._givers_by_rank else 1

    @cached_property
    def _givers_by_rank(self) -> list[int]:
        return [
            sum(self.links[link].gives for link in self.links_of(rank))
            for rank in range(self.world_size)
        ]

    @cached_property
    def slots(self) -> list[int]:
        """By link: where an all_gather of M messages a rank puts its message; -1: it gives none."""
        counts = [0] * self.world_size
        slots = []
        for link in self.links:
            slots.append(link.rank * self.most_givers + counts[link.rank] if link.gives else -1)
            counts[link.rank] += link.gives
        return slots

    @cached_property
    def is_connected(self) -> bool:
        """Whether any state travels at all."""
        return any(link.takes for link in self.links)


@dataclass(frozen=True)
class LinkState:
    """What one link does to a state: S_l and, unless it is the identity, G_l."""

    state: Tensor
    """[B, H, K, V], or [B, ...] for other mixers; float32."""
    log_transition: Tensor | None
    """[B, H] or [B, H, K], any leading part of the state's shape; natural logarithms <= 0."""


def decayed(state: Tensor, log_transition: Tensor | None) -> Tensor:
    """exp(G) * state, G broadcast from the left."""
    if log_transition is None:
        return state
    trailing = (1,) * (state.ndim - log_transition.ndim)
    factor = log_transition.exp().to(state.dtype)
    return state * factor.view(*log_transition.shape, *trailing)
