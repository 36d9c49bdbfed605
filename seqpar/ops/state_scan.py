"""One exclusive scan over the chain, as one rank sees it: what every exchange starts from.

Legend: B batch, H heads, K key dim, V value dim, L links, W ranks.

`ScanPlan` is what follows from layout, rank and shapes: made once and kept. `Scan` adds tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from seqpar.kernels.chain_sum import ChainTable
from seqpar.kernels.entry_product import LOG_FLOOR
from seqpar.ops.state_chain import LinkState, StateChain

__all__ = ["Entries", "Scan", "ScanPlan", "put_heads", "select_heads"]

Entries = dict[int, Tensor]
"""By link index: the state that enters. Links that take nothing are absent."""


@dataclass(frozen=True, eq=False)
class ScanPlan:
    """A scan without its tensors; a pure function of layout, rank, shapes and fixed decays.

    Kept by `state_plan`; two plans are equal only if they are one, so that what follows from a
    plan can be kept by it at no cost.
    """

    chain: StateChain
    rank: int
    state_shape: tuple[int, ...]
    """[B, ...] of every link's S."""
    transition_shape: tuple[int, ...] | None
    """[B, ...] of every link's G, a leading part of S's; None: the identity."""
    carries: bool
    """G travels with S; else every rank knows every link's."""
    dtype: torch.dtype
    device: torch.device
    host_log_decay: tuple[float, ...] | None = None
    """Fixed log decay by head, on the host: heads that have decayed are not sent. None: all are."""
    whole: bool = False
    """States travel with all heads: who takes leaves out links of which no head still matters."""

    @cached_property
    def own_links(self) -> list[int]:
        """This rank's links, in chain order."""
        return self.chain.links_of(self.rank)

    @cached_property
    def takers(self) -> list[int]:
        """This rank's links that a state enters."""
        return [link for link in self.own_links if self.chain.links[link].takes]

    @cached_property
    def gives(self) -> bool:
        """Whether a state of this rank enters any other link."""
        return any(self.chain.links[link].gives for link in self.own_links)

    @cached_property
    def sources(self) -> tuple[int, ...]:
        """Ranks of the links whose states make up what enters this rank's links."""
        links = {x for link in self.takers for x in range(self.first_source(link), link)}
        return tuple(sorted({self.chain.links[x].rank for x in links}))

    @cached_property
    def far_heads(self) -> list[int] | None:
        """Heads that still matter beyond some link that they pass; None: no head is cut off."""
        if self.whole:
            return None
        passing = [link.num_tokens for link in self.chain.links if link.passes]
        if self.host_log_decay is None or not passing:
            return None
        least = min(passing)
        heads = range(len(self.host_log_decay))
        far = [h for h in heads if self.host_log_decay[h] * least >= LOG_FLOOR]
        return None if len(far) == len(self.host_log_decay) else far

    @cached_property
    def near_heads(self) -> list[int]:
        """The other heads: they reach the next link and no further."""
        far = self.far_heads
        return [] if far is None else [h for h in range(self.state_shape[1]) if h not in far]

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

    def first_source(self, link: int) -> int:
        """The first link whose state enters this one, which takes; all between them do too."""
        first = link - 1
        while self.chain.links[first].passes and self._matters(first - 1, link):
            first -= 1
        return first

    def _matters(self, source: int, target: int) -> bool:
        """Whether a state that goes whole is wanted: some head of it has not decayed."""
        return not self.whole or self.heads_between(source, target) != []

    @cached_property
    def saved_messages(self) -> int:
        """Messages of M links that an all_gather of states as a whole does without."""
        if not self.whole:
            return 0
        return len(replace(self, whole=False).sources) - len(self.sources)

    @cached_property
    def has_one_source(self) -> bool:
        """Whether only the link before enters each taking link of this rank."""
        return all(self.first_source(link) == link - 1 for link in self.takers)

    @cached_property
    def chain_table(self) -> ChainTable:
        """Which messages of an all_gather make up what enters this rank's links."""
        return ChainTable.of(
            [(self.first_source(link), link) for link in self.takers],
            self.chain.slots,
            [link.num_tokens for link in self.chain.links],
            self.device,
        )

    @cached_property
    def state_numel(self) -> int:
        """Elements of one link's state."""
        return math.prod(self.state_shape)

    @cached_property
    def numel(self) -> int:
        """Elements of one link's message."""
        carried = self.transition_shape if self.carries else None
        return self.state_numel + (0 if carried is None else math.prod(carried))

    @cached_property
    def head_bytes(self) -> int:
        """Bytes of one head of one link's state."""
        return self.state_numel // self.state_shape[1] * self.dtype.itemsize

    def of_heads(self, heads: list[int]) -> ScanPlan:
        """The same for some heads alone (dim 1 of states)."""
        key = tuple(heads)
        if key not in self._of_heads:
            cut = self.transition_shape
            self._of_heads[key] = replace(
                self,
                state_shape=(self.state_shape[0], len(heads), *self.state_shape[2:]),
                transition_shape=None if cut is None else (cut[0], len(heads), *cut[2:]),
                host_log_decay=None,
            )
        return self._of_heads[key]

    @cached_property
    def _of_heads(self) -> dict[tuple[int, ...], ScanPlan]:
        return {}

    def new_state(self) -> Tensor:
        """Uninitialised memory for one state."""
        return torch.empty(self.state_shape, dtype=self.dtype, device=self.device)

    def new_message(self) -> Tensor:
        """Uninitialised memory for one link's message, shaped as `Scan.pack` shapes it."""
        shape = (self.numel,) if self.carries else self.state_shape
        return torch.empty(shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class Scan:
    """One exclusive scan over the chain, as one rank sees it."""

    plan: ScanPlan
    own: dict[int, LinkState]
    """Summaries of this rank's links, by link index; G only where it travels."""
    log_decay: Tensor | None = None
    """Fixed log decay of one token, [...] like a G without its B; None: not fixed, or none."""

    @property
    def chain(self) -> StateChain:
        return self.plan.chain

    def known(self, links: Iterable[int]) -> Tensor | None:
        """The sum of G over links, for one row, where every rank knows it; None is the identity."""
        if self.log_decay is None:
            return None
        tokens = sum(self.chain.links[link].num_tokens for link in links)
        return self.log_decay.double()[None] * tokens

    def transition(self, link: int) -> Tensor | None:
        """G of one of this rank's links."""
        return self.own[link].log_transition if self.plan.carries else self.known([link])

    def of_heads(self, heads: list[int] | None) -> Scan:
        """The same scan for some heads alone (dim 1 of states)."""
        if heads is None:
            return self
        own = {
            link: LinkState(
                select_heads(item.state, heads),
                None if item.log_transition is None else select_heads(item.log_transition, heads),
            )
            for link, item in self.own.items()
        }
        decay = self.log_decay
        decay = None if decay is None else select_heads(decay[None], heads)[0]
        return Scan(self.plan.of_heads(heads), own, decay)

    def pack(self, item: LinkState) -> Tensor:
        """A link's message: the state, and the transition, flat, unless every rank knows it."""
        if not self.plan.carries:
            return item.state
        assert item.log_transition is not None
        transition = item.log_transition.to(item.state.dtype)
        return torch.cat([item.state.reshape(-1), transition.reshape(-1)])

    def state_in(self, message: Tensor) -> Tensor:
        """The state alone from a link's message."""
        if not self.plan.carries:
            shape = self.plan.state_shape
            return message if message.shape == shape else message.view(shape)
        return message[: self.plan.state_numel].view(self.plan.state_shape)

    def unpack(self, link: int, message: Tensor, *, with_known: bool) -> LinkState:
        """The summary of a link from its message, or from its message and what every rank knows."""
        state = self.state_in(message)
        if not self.plan.carries:
            return LinkState(state, self.known([link]) if with_known else None)
        assert self.plan.transition_shape is not None
        transition = message[self.plan.state_numel :]
        return LinkState(state, transition.view(self.plan.transition_shape))


def select_heads(x: Tensor, heads: list[int]) -> Tensor:
    """x[:, heads], heads ascending; a view if they are consecutive."""
    parts = [x[:, part] for part in _consecutive(heads)]
    return parts[0] if len(parts) == 1 else torch.cat([x[:, :0], *parts], dim=1)


def put_heads(x: Tensor, heads: list[int], value: Tensor) -> None:
    """x[:, heads] = value, heads ascending."""
    done = 0
    for part in _consecutive(heads):
        count = part.stop - part.start
        x[:, part] = value[:, done : done + count]
        done += count


def _consecutive(heads: list[int]) -> list[slice]:
    """As slices: a list would be copied to the device, which waits, and which graphs refuse."""
    parts: list[slice] = []
    for head in heads:
        if parts and parts[-1].stop == head:
            parts[-1] = slice(parts[-1].start, head + 1)
        else:
            parts.append(slice(head, head + 1))
    return parts
