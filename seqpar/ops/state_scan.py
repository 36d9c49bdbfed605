"""One exclusive scan over the chain, as one rank sees it: what every exchange starts from.

Legend: B batch, H heads, K key dim, V value dim, L links, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from seqpar.kernels.entry_product import LOG_FLOOR
from seqpar.ops.state_chain import LinkState, StateChain

__all__ = ["Entries", "Scan", "select_heads"]

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
    """Shapes and dtype of every summary (meta tensors); an empty rank needs them."""
    device: torch.device
    known: Callable[[int], Tensor | None] | None
    """The log transition of any link, where every rank knows it; None: it travels with S."""
    host_log_decay: tuple[float, ...] | None = None
    """Fixed log decay by head, on the host: heads that have decayed are not sent. None: all are."""

    @property
    def own_links(self) -> list[int]:
        return self.chain.links_of(self.rank)

    @cached_property
    def far_heads(self) -> list[int] | None:
        """Heads that still matter beyond some link that they pass; None: no head is cut off."""
        passing = [link.num_tokens for link in self.chain.links if link.passes]
        if self.host_log_decay is None or not passing:
            return None
        least = min(passing)
        heads = range(len(self.host_log_decay))
        far = [h for h in heads if self.host_log_decay[h] * least >= LOG_FLOOR]
        return None if len(far) == len(self.host_log_decay) else far

    def heads_between(self, source: int, target: int) -> list[int] | None:
        """Heads for which the source's state still matters at the target; None: all do."""
        if self.host_log_decay is None:
            return None
        tokens = sum(self.chain.links[link].num_tokens for link in range(source + 1, target))
        heads = [h for h, g in enumerate(self.host_log_decay) if g * tokens >= LOG_FLOOR]
        return None if len(heads) == len(self.host_log_decay) else heads

    def reaches(self, source: int, target: int) -> bool:
        """Whether a state of the source link enters the target link, by document bounds alone."""
        if source < 0 or target >= len(self.chain.links):
            return False
        between = self.chain.links[source + 1 : target]
        return self.chain.links[target].takes and all(link.passes for link in between)

    def of_heads(self, heads: list[int] | None) -> Scan:
        """The same scan for some heads alone (dim 1 of states)."""
        if heads is None:
            return self

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else select_heads(x, heads)

        known = self.known

        def cut_link(item: LinkState) -> LinkState:
            return LinkState(select_heads(item.state, heads), cut(item.log_transition))

        return replace(
            self,
            own={link: cut_link(item) for link, item in self.own.items()},
            like=cut_link(self.like),
            known=None if known is None else lambda link: cut(known(link)),
            host_log_decay=None,
        )

    @property
    def _carries_transition(self) -> bool:
        return self.known is None and self.like.log_transition is not None

    @property
    def numel(self) -> int:
        """Elements of one link's message."""
        transition = self.like.log_transition
        extra = transition.numel() if transition is not None and self._carries_transition else 0
        return self.like.state.numel() + extra

    def pack(self, item: LinkState) -> Tensor:
        """A link's message, flat: the state, and the transition unless every rank knows it."""
        if not self._carries_transition:
            return item.state.reshape(-1)
        assert item.log_transition is not None
        transition = item.log_transition.to(item.state.dtype)
        return torch.cat([item.state.reshape(-1), transition.reshape(-1)])

    def state_in(self, message: Tensor) -> Tensor:
        """The state alone from a link's message."""
        return message[: self.like.state.numel()].view(self.like.state.shape)

    def unpack(self, link: int, message: Tensor) -> LinkState:
        """The summary of a link from its message."""
        state = self.state_in(message)
        if not self._carries_transition:
            return LinkState(state, None if self.known is None else self.known(link))
        assert self.like.log_transition is not None
        transition = message[self.like.state.numel() :]
        return LinkState(state, transition.view(self.like.log_transition.shape))

    def new_message(self, *leading: int) -> Tensor:
        """Uninitialised memory for messages."""
        return torch.empty(*leading, self.numel, dtype=self.like.state.dtype, device=self.device)


def select_heads(x: Tensor, heads: list[int]) -> Tensor:
    """x[:, heads], a view if they are consecutive."""
    if heads and heads[-1] - heads[0] + 1 > len(heads):
        return x[:, heads]
    return x[:, heads[0] : heads[-1] + 1] if heads else x[:, :0]
