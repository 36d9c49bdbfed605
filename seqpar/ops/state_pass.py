"""The exchanges along the chain: each link passes on what it received, decayed, and its own.

Legend: B batch, H heads, K key dim, V value dim, L links, W ranks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.ops.state_chain import StateChain, decayed
from seqpar.ops.state_scan import Entries, Scan, select_heads
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

    def of(self, x: Tensor) -> Tensor:
        x = x if self.heads is None else select_heads(x, self.heads)
        return x[:, :, self.rows] if x.ndim > 2 else x

    def assign(self, x: Tensor, value: Tensor) -> None:
        """x's part = value."""
        heads = slice(None) if self.heads is None else self.heads
        if x.ndim > 2:
            x[:, heads, self.rows] = value
        else:
            x[:, heads] = value


def _parts(scan: Scan, num_slices: int) -> list[_Part]:
    """Slices of the heads that wait, after one part of all heads that do not."""
    far = scan.far_heads
    everything = slice(None)
    parts = []
    if far is not None:
        near = [h for h in range(scan.like.state.shape[1]) if h not in far]
        parts.append(_Part(near, everything, waits=False))
        if not far:
            return parts
    rows = scan.like.state.shape[2] if scan.like.state.ndim > 2 else 1
    cuts = [rows * i // num_slices for i in range(num_slices + 1)]
    slices = [slice(a, b) for a, b in itertools.pairwise(cuts) if b > a]
    return parts + [_Part(far, one, waits=True) for one in slices]


def _chain(scan: Scan, num_slices: int) -> Steps[Entries]:
    """All parts over all hops, in rounds that every rank counts alike.

    A rank may hold links far apart in the chain, and a message is not sent before its receiver is
    ready. So a rank posts all that a round moves at once, and waits for no other rank's round.
    """
    links, parts = scan.chain.links, _parts(scan, num_slices)
    rounds = _rounds(scan.chain, parts)
    arrived: dict[tuple[int, int], Tensor] = {}
    for now in range(max(rounds.values(), default=-1) + 1):
        sends: list[tuple[int, Tensor]] = []
        recvs: list[tuple[int, Tensor]] = []
        for index in scan.own_links:
            for number, part in enumerate(parts):
                if rounds.get((index, number)) == now:
                    leaving = _leaving(scan, index, part, arrived.get((index, number)))
                    sends.append((links[index + 1].rank, leaving.contiguous()))
                if rounds.get((index - 1, number)) == now:
                    landing = torch.empty_like(part.of(scan.like.state), device=scan.device)
                    recvs.append((links[index - 1].rank, landing))
                    arrived[index, number] = landing
        if sends or recvs:
            yield Swap(sends, recvs)
    takers = [index for index in scan.own_links if links[index].takes]
    return {index: _assembled(scan, parts, arrived, index) for index in takers}


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


def _leaving(scan: Scan, link: int, part: _Part, entering: Tensor | None) -> Tensor:
    """A part of what leaves a link."""
    own = scan.own[link]
    state = part.of(own.state)
    if entering is None or not (scan.chain.links[link].passes and part.waits):
        return state
    transition = own.log_transition
    return state + decayed(entering, None if transition is None else part.of(transition))


def _assembled(
    scan: Scan, parts: list[_Part], arrived: dict[tuple[int, int], Tensor], link: int
) -> Tensor:
    """The state that enters a link, from its parts."""
    if len(parts) == 1:
        return arrived[link, 0]
    entry = torch.empty_like(scan.like.state, device=scan.device)
    for number, part in enumerate(parts):
        part.assign(entry, arrived[link, number])
    return entry
