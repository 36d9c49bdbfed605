"""How states travel along the chain: interchangeable exchanges, each a generator of requests.

Legend: B batch, H heads, K key dim, V value dim, L links, W ranks.

Each takes the links' own summaries (S_l, G_l) and gives, for every link of this rank that takes,
what enters it: E_l = Σ_(p<l) exp(Σ_(p<i<l) G_i) S_p, over the links that hold its document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.ops.state_chain import LinkState, StateChain, decayed
from seqpar.ops.steps import AllGather, Steps

__all__ = ["EXCHANGES", "Entries", "Scan", "all_gather_states"]

Entries = dict[int, Tensor]
"""By link index: the state that enters. Links that take nothing are absent."""


@dataclass(frozen=True)
class Scan:
    """One exclusive scan over the chain, as one rank sees it."""

    chain: StateChain
    rank: int
    own: dict[int, LinkState]
    """Summaries of this rank's links, by link index."""
    like: LinkState
    """Shapes, dtype and device of every summary (meta tensors do); an empty rank needs them."""
    device: torch.device
    known: list[Tensor | None] | None
    """Log transitions by link where every rank knows them; None: they travel with the states."""

    @property
    def numel(self) -> int:
        """Elements of one link's message."""
        transition = self.like.log_transition
        carried = self.known is None and transition is not None
        return self.like.state.numel() + (
            transition.numel() if carried and transition is not None else 0
        )

    def pack(self, item: LinkState) -> Tensor:
        """A link's message, flat."""
        if self.known is not None or item.log_transition is None:
            return item.state.reshape(-1)
        transition = item.log_transition.to(item.state.dtype)
        return torch.cat([item.state.reshape(-1), transition.reshape(-1)])

    def unpack(self, link: int, message: Tensor) -> LinkState:
        """The summary of a link from its message."""
        size = self.like.state.numel()
        state = message[:size].view(self.like.state.shape)
        if self.known is not None:
            return LinkState(state, self.known[link])
        if self.like.log_transition is None:
            return LinkState(state, None)
        return LinkState(state, message[size:].view(self.like.log_transition.shape))


def all_gather_states(scan: Scan) -> Steps[Entries]:
    """One all_gather of every giving link's summary; each rank sums its own prefixes.

    Source: LASP-2, arXiv 2502.07563; LASP+, arXiv 2501.08313 section 3.2.
    """
    chain = scan.chain
    places = _places_of_givers(chain)
    width = max((place + 1 for place in places.values()), default=0)
    if not width:
        return {}
    dtype = scan.like.state.dtype
    message = torch.zeros(width, scan.numel, dtype=dtype, device=scan.device)
    for link, item in scan.own.items():
        if link in places:
            message[places[link]] = scan.pack(item)
    gathered: Tensor = yield AllGather(message)

    def summary(link: int) -> LinkState:
        return scan.unpack(link, gathered[chain.links[link].rank, places[link]])

    takers = [link for link in chain.links_of(scan.rank) if chain.links[link].takes]
    return {link: _prefix(chain, link, summary) for link in takers}


EXCHANGES: dict[str, Callable[[Scan], Steps[Entries]]] = {"all_gather": all_gather_states}
"""By name: every exchange that moves states."""


def _places_of_givers(chain: StateChain) -> dict[int, int]:
    """Where each giving link stands among its own rank's giving links."""
    counts = [0] * chain.world_size
    places = {}
    for index, link in enumerate(chain.links):
        if link.gives:
            places[index] = counts[link.rank]
            counts[link.rank] += 1
    return places


def _prefix(chain: StateChain, link: int, summary: Callable[[int], LinkState]) -> Tensor:
    """What enters a link, by Horner's rule over the links before it that hold its document."""
    first = link - 1
    while chain.links[first].passes:
        first -= 1
    entry = summary(first).state
    for index in range(first + 1, link):
        item = summary(index)
        entry = item.state + decayed(entry, item.log_transition)
    return entry
