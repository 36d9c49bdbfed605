"""The exchanges along the chain: each link passes on what it received, decayed, and its own.

Legend: B batch, H heads, K key dim, V value dim, L links, W ranks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from seqpar.ops.state_chain import StateChain, decayed
from seqpar.ops.state_scan import Entries, Scan, ScanPlan, put_heads, select_heads
from seqpar.ops.steps import Steps, Swap

__all__ = ["chain_states", "pipelined_chain_states"]

NUM_SLICES = 8
"""Slices of the pipelined chain; fewer if the key dim is smaller."""


def chain_states(scan: Scan) -> Steps[Entries]:
    """Each link receives from the one before, adds its own, and sends to the one after.

    Bytes received per rank: 4 * B * H * K * V for each of its links that takes.

    Source: LASP, arXiv 2404.02882.
    """
    return (yield from _chain(scan, 1))


def pipelined_chain_states(scan: Scan) -> Steps[Entries]:
    """The chain, cut in slices of the state: a slice is sent on while the next one arrives.

    Bytes as for the chain.

    Source: ZeCO's All-Scan, arXiv 2507.01004.
    """
    return (yield from _chain(scan, NUM_SLICES))


@dataclass(frozen=True)
class _Part:
    """A part of every state that travels as one message: some heads, some rows of dim 2."""

    heads: list[int] | None
    rows: slice
    waits: bool
    """What is sent on depends on what was received; else it can be sent at once."""

    def new(self, plan: ScanPlan) -> Tensor:
        """Uninitialised memory for the part of one state."""
        shape = list(plan.state_shape)
        shape[1] = shape[1] if self.heads is None else len(self.heads)
        if len(shape) > 2:
            shape[2] = len(range(*self.rows.indices(shape[2])))
        return torch.empty(shape, dtype=plan.dtype, device=plan.device)

    def of(self, x: Tensor) -> Tensor:
        """The part of a state or a transition."""
        x = x if self.heads is None else select_heads(x, self.heads)
        return x[:, :, self.rows] if x.ndim > 2 else x

    def assign(self, x: Tensor, value: Tensor) -> None:
        """x's part = value."""
        part = x[:, :, self.rows] if x.ndim > 2 else x
        put_heads(part, list(range(x.shape[1])) if self.heads is None else self.heads, value)


@dataclass(frozen=True)
class _Round:
    """What one rank sends and receives at once: (link, number of the part) each."""

    sends: list[tuple[int, int]]
    recvs: list[tuple[int, int]]


@lru_cache(maxsize=256)
def _schedule(plan: ScanPlan, num_slices: int) -> tuple[list[_Part], list[_Round]]:
    """The parts, and the rounds of a rank in which it moves any.

    All parts go over all hops in rounds that every rank counts alike. A rank may hold links far
    apart in the chain, and a message is not sent before its receiver is ready. So a rank posts all
    that a round moves at once, and waits for no other rank's round.
    """
    parts = _parts(plan, num_slices)
    when = _rounds(plan.chain, parts)
    rounds = []
    for now in range(max(when.values(), default=-1) + 1):
        own = [(link, number) for link in plan.own_links for number in range(len(parts))]
        sends = [(link, number) for link, number in own if when.get((link, number)) == now]
        recvs = [(link, number) for link, number in own if when.get((link - 1, number)) == now]
        if sends or recvs:
            rounds.append(_Round(sends, recvs))
    return parts, rounds


def _parts(plan: ScanPlan, num_slices: int) -> list[_Part]:
    """Slices of the heads that wait, after one part of all heads that do not."""
    far, shape = plan.far_heads, plan.state_shape
    parts = []
    if far is not None:
        parts.append(_Part(plan.near_heads, slice(None), waits=False))
        if not far:
            return parts
    rows = shape[2] if len(shape) > 2 else 1
    cuts = [rows * i // num_slices for i in range(num_slices + 1)]
    slices = [slice(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    return parts + [_Part(far, one, waits=True) for one in slices]


def _rounds(chain: StateChain, parts: list[_Part]) -> dict[tuple[int, int], int]:
    """(giving link, part) -> the round in which it leaves: one after that in which it arrives."""
    rounds, depth = {}, 0
    slices_before = [sum(part.waits for part in parts[:number]) for number in range(len(parts))]
    for index, link in enumerate(chain.links):
        depth = depth + 1 if link.passes else 0
        if link.gives:
            for number, part in enumerate(parts):
                rounds[index, number] = depth + slices_before[number] if part.waits else 0
    return rounds


def _chain(scan: Scan, num_slices: int) -> Steps[Entries]:
    """The rounds of the schedule, one after the other."""
    plan, links = scan.plan, scan.chain.links
    parts, rounds = _schedule(plan, num_slices)
    arrived: dict[tuple[int, int], Tensor] = {}
    for moved in rounds:
        sends = []
        for link, number in moved.sends:
            leaving = _leaving(scan, link, parts[number], arrived.get((link, number)))
            sends.append((links[link + 1].rank, leaving.contiguous()))
        recvs = []
        for link, number in moved.recvs:
            arrived[link, number] = parts[number].new(plan)
            recvs.append((links[link - 1].rank, arrived[link, number]))
        yield Swap(sends, recvs)
    return {link: _assembled(plan, parts, arrived, link) for link in plan.takers}


def _leaving(scan: Scan, link: int, part: _Part, entering: Tensor | None) -> Tensor:
    """A part of what leaves a link."""
    state = part.of(scan.own[link].state)
    if entering is None or not (scan.chain.links[link].passes and part.waits):
        return state
    transition = scan.transition(link)
    return state + decayed(entering, None if transition is None else part.of(transition))


def _assembled(
    plan: ScanPlan, parts: list[_Part], arrived: dict[tuple[int, int], Tensor], link: int
) -> Tensor:
    """The state that enters a link, from its parts."""
    if len(parts) == 1:
        return arrived[link, 0]
    entry = plan.new_state()
    for number, part in enumerate(parts):
        part.assign(entry, arrived[link, number])
    return entry
