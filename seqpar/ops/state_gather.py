"""The exchange by all_gather: everyone learns every link's summary.

Legend: B batch, H heads, K key dim, V value dim, L links, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqpar import comm
from seqpar.ops.state_chain import decayed
from seqpar.ops.state_scan import Entries, Scan
from seqpar.ops.steps import AllGather, Steps, Swap, Together

__all__ = ["all_gather_states"]


def all_gather_states(scan: Scan) -> Steps[Entries]:
    """One all_gather of every giving link's summary; each rank sums its own prefixes.

    Bytes received per rank: (W - 1) * M * 4 * B * (H' * K * V + H' if the decay is per token), M
    the most giving links on one rank, H' the heads that are not cut off. Heads that are cut off
    cost one state for each taking link, point to point.

    Source: LASP-2, arXiv 2502.07563; LASP+, arXiv 2501.08313 section 3.2.
    """
    if not scan.chain.is_connected:
        return {}
    far = scan.far_heads
    if far is None:
        gather, finish = _gathering(scan)
        return finish((yield gather))
    near = [h for h in range(scan.like.state.shape[1]) if h not in far]
    _report_saved(scan, near)
    swap, finish_near = _neighbours(scan.of_heads(near))
    if not far:
        yield swap
        return finish_near()
    gather, finish_far = _gathering(scan.of_heads(far))
    _, gathered = yield Together([swap, gather])
    nears, fars = finish_near(), finish_far(gathered)
    return {link: _joined(near, nears[link], far, fars[link]) for link in nears}


def _gathering(scan: Scan) -> tuple[AllGather, Callable[[Tensor], Entries]]:
    """The all_gather of the giving links, and what makes entries of what it delivers."""
    chain = scan.chain
    places = chain.places_of_givers
    given = [scan.pack(scan.own[link]) for link in scan.own_links if link in places]
    missing = max(places.values()) + 1 - len(given)
    given += [scan.new_message().zero_() for _ in range(missing)]
    message = torch.stack(given) if len(given) > 1 else given[0][None]

    def finish(gathered: Tensor) -> Entries:
        takers = [link for link in scan.own_links if chain.links[link].takes]
        return {link: _prefix(scan, link, gathered, places) for link in takers}

    return AllGather(message), finish


def _neighbours(scan: Scan) -> tuple[Swap, Callable[[], Entries]]:
    """Every giving link's own state to the next link: all that heads which decay need."""
    links, entries = scan.chain.links, {}
    sends, recvs = [], []
    for index in scan.own_links:
        if links[index].gives:
            sends.append((links[index + 1].rank, scan.own[index].state.contiguous()))
        if links[index].takes:
            entries[index] = torch.empty_like(scan.like.state, device=scan.device)
            recvs.append((links[index - 1].rank, entries[index]))
    return Swap(sends, recvs), lambda: entries


def _prefix(scan: Scan, link: int, gathered: Tensor, places: dict[int, int]) -> Tensor:
    """What enters a link, by Horner's rule over the links before it that hold its document."""
    links = scan.chain.links
    first = link - 1
    while links[first].passes:
        first -= 1
    entry = scan.state_in(gathered[links[first].rank, places[first]])
    for index in range(first + 1, link):
        item = scan.unpack(index, gathered[links[index].rank, places[index]])
        entry = item.state + decayed(entry, item.log_transition)
    # A view would hold every rank's states in memory for as long as this one is wanted.
    return entry.clone() if first == link - 1 and scan.chain.world_size > 2 else entry


def _report_saved(scan: Scan, near: list[int]) -> None:
    """Bytes that the all_gather would have received for heads that go to the neighbour alone."""
    places = scan.chain.places_of_givers
    width = max(places.values()) + 1
    state_bytes = scan.like.state[:, 0].numel() * scan.like.state.element_size() * len(near)
    taken = sum(scan.chain.links[link].takes for link in scan.own_links)
    gathered = (scan.chain.world_size - 1) * width
    comm.report_saved("all_gather", (gathered - taken) * state_bytes)


def _joined(near: list[int], nears: Tensor, far: list[int], fars: Tensor) -> Tensor:
    """One state of all heads from two of some heads each."""
    state = nears.new_empty(nears.shape[0], len(near) + len(far), *nears.shape[2:])
    for heads, part in ((near, nears), (far, fars)):
        state[:, heads] = part
    return state
