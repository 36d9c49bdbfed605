"""What a scattered call needs and that follows from layout, rank and shapes: made once, and kept.

Legend: B batch, T tokens on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch

from seqpar.kernels.entry_product import reached_tokens
from seqpar.layout import SequenceLayout
from seqpar.ops.state_chain import StateChain
from seqpar.ops.state_mixer import Inputs, StateKind
from seqpar.ops.state_places import RankPlaces, places_of
from seqpar.ops.state_scan import ScanPlan

__all__ = ["RankPlan", "plan_for", "rank_plan"]

_LATER_SHARE = 0.125
"""Adding later reads and writes the reached tokens once more: worth it while they are few."""


def plan_for(
    kind: StateKind,
    layout: SequenceLayout,
    rank: int,
    inputs: Inputs,
    *,
    overlap: bool,
    whole: bool = False,
) -> RankPlan:
    """The plan of a rank for inputs [B, T, ...] of this shape, dtype and device."""
    x = inputs[0]
    return rank_plan(kind, layout, rank, x.shape[0], x.dtype, x.device, overlap, whole)


@lru_cache(maxsize=512)
def rank_plan(
    kind: StateKind,
    layout: SequenceLayout,
    rank: int,
    batch: int,
    dtype: torch.dtype,
    device: torch.device,
    overlap: bool,
    whole: bool = False,
) -> RankPlan:
    """The plan of a rank: the same object for every call that is alike."""
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    places = places_of(layout, rank)
    return RankPlan(kind, layout, rank, places, batch, state_dtype, device, overlap, whole)


@dataclass(frozen=True, eq=False)
class RankPlan:
    """One rank's part of a scattered mixer without any of its tensors."""

    kind: StateKind
    layout: SequenceLayout
    rank: int
    places: RankPlaces
    batch: int
    state_dtype: torch.dtype
    """float32; float64 for float64 inputs, which check gradients."""
    device: torch.device
    overlap: bool
    """Add states that arrive late afterwards, where the mixer can, instead of waiting for them."""
    whole: bool = False
    """States travel with all heads, from where any head still matters: one all_gather does it."""

    @cached_property
    def is_empty(self) -> bool:
        """Whether the rank has no tokens."""
        return self.layout.tokens_on(self.rank) == 0

    @cached_property
    def state_shape(self) -> tuple[int, ...]:
        """[B, *state_shape] of one sequence in each row."""
        return (self.batch, *self.kind.state_shape)

    @cached_property
    def forward_scan(self) -> ScanPlan:
        """The scan of states."""
        return self._scan(self.places.chain)

    @cached_property
    def backward_scan(self) -> ScanPlan:
        """The scan of their gradients, on the reversed chain."""
        return self._scan(self.places.reversed_chain)

    def _scan(self, chain: StateChain) -> ScanPlan:
        dims = self.kind.transition_dims
        return ScanPlan(
            chain=chain,
            rank=self.rank,
            state_shape=self.state_shape,
            transition_shape=None if dims is None else self.state_shape[: 1 + dims],
            carries=dims is not None and not self.kind.knows_transitions,
            dtype=self.state_dtype,
            device=self.device,
            host_log_decay=self.kind.host_log_decay,
            whole=self.whole,
        )

    @cached_property
    def adds_later(self) -> bool:
        """Whether the local work is done while states travel, and they are added then.

        Without adding, no rank computes beside an exchange, not even one that nothing enters:
        kernels that fill the device and the exchange hold each other back.
        """
        decay = self.kind.host_log_decay
        if not (self.overlap and self.kind.adds_later) or decay is None:
            return False
        return all(_reaches_few(decay, tokens) for tokens in self.places.link_tokens)

    @cached_property
    def is_simple(self) -> bool:
        """Whether this rank is one run, each rank at most one giving link, no head is cut off, no
        transition travels, and everything is waited for: what `state_lean` takes."""
        scans = (self.forward_scan, self.backward_scan)
        return (
            self.places.num_runs == 1
            and all(scan.chain.most_givers == 1 for scan in scans)
            and all(scan.far_heads is None and not scan.carries for scan in scans)
            and not self.adds_later
        )


def _reaches_few(log_decay: tuple[float, ...], num_tokens: int) -> bool:
    """Whether a state reaches so few tokens, over all heads, that they can be added to later."""
    reached = sum(reached_tokens(g, num_tokens) for g in log_decay)
    return reached <= _LATER_SHARE * num_tokens * len(log_decay)
