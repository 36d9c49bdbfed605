"""The exchange by all_gather: everyone learns every link's summary.

Legend: B batch, H heads, K key dim, V value dim, L links, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqpar import comm
from seqpar.kernels.chain_sum import can_sum, chain_sums
from seqpar.ops.state_chain import decayed
from seqpar.ops.state_scan import Entries, Scan, ScanPlan, put_heads
from seqpar.ops.steps import AllGather, Steps, Swap, Together

__all__ = ["all_gather_states", "entry_of", "gathering"]


def all_gather_states(scan: Scan) -> Steps[Entries]:
    """One all_gather of every giving link's summary; each rank sums its own prefixes.

    Bytes received per rank: (W - 1) * M * 4 * B * (H' * K * V + H' if the decay is per token), M
    the most giving links on one rank, H' the heads that are not cut off. Heads that are cut off
    cost one state for each taking link, point to point. Over memory that peers read, states stay
    whole, and only messages of ranks are received whose links' states enter here with a head that
    still matters: H for H', and in place of W - 1 as many as those are.

    Source: LASP-2, arXiv 2502.07563; LASP+, arXiv 2501.08313 section 3.2.
    """
    plan = scan.plan
    if not plan.chain.is_connected:
        return {}
    far, near = plan.far_heads, plan.near_heads
    if far is None:
        return _prefixes(scan, (yield gathering(plan, _message(scan))))
    _report_saved(plan)
    swap, finish_near = _neighbours(scan.of_heads(near))
    if not far:
        yield swap
        return finish_near()
    of_far = scan.of_heads(far)
    _, gathered = yield Together([swap, gathering(plan, _message(of_far))])
    nears, fars = finish_near(), _prefixes(of_far, gathered)
    return {link: _joined(near, nears[link], far, fars[link]) for link in nears}


def gathering(plan: ScanPlan, message: Tensor) -> AllGather:
    """The request for what enters this rank's links."""
    if plan.saved_messages:
        saved = plan.saved_messages * plan.chain.most_givers * plan.numel * plan.dtype.itemsize
        comm.report_saved("all_gather", saved)
    return AllGather(message, gives=plan.gives, sources=plan.sources)


def _message(scan: Scan) -> Tensor:
    """What this rank gives: the messages of its giving links, [M, ...] where M > 1."""
    chain, own = scan.chain, scan.own
    given = [scan.pack(own[link]) for link in scan.plan.own_links if chain.links[link].gives]
    if chain.most_givers == 1:
        # Nobody reads what a rank without a giving link sends.
        return given[0].contiguous() if given else scan.plan.new_message()
    messages = torch.empty(
        chain.most_givers, scan.plan.numel, dtype=scan.plan.dtype, device=scan.plan.device
    )
    for place, message in enumerate(given):
        messages[place].copy_(message.reshape(-1))
    return messages


def _neighbours(scan: Scan) -> tuple[Swap, Callable[[], Entries]]:
    """Every giving link's own state to the next link: all that heads which decay need."""
    links, entries = scan.chain.links, {}
    sends, recvs = [], []
    for index in scan.plan.own_links:
        if links[index].gives:
            sends.append((links[index + 1].rank, scan.own[index].state.contiguous()))
        if links[index].takes:
            entries[index] = scan.plan.new_state()
            recvs.append((links[index - 1].rank, entries[index]))
    return Swap(sends, recvs), lambda: entries


def _prefixes(scan: Scan, gathered: Tensor) -> Entries:
    """What enters each taking link: the sum over the links before it that hold its document."""
    plan, chain = scan.plan, scan.chain
    if not plan.takers:
        return {}
    messages = gathered
    sums_up = can_sum(gathered) and not _is_half(plan, gathered)
    if chain.most_givers > 1 or not plan.has_one_source or sums_up:
        messages = gathered.view(chain.world_size * chain.most_givers, plan.numel)
    if sums_up:
        sums = chain_sums(
            messages,
            plan.chain_table,
            plan.state_shape,
            carries=plan.carries,
            log_decay=scan.log_decay,
        )
        return dict(zip(plan.takers, sums.unbind(0), strict=True))
    return {link: _prefix(scan, link, messages) for link in plan.takers}


def entry_of(plan: ScanPlan, gathered: Tensor, log_decay: Tensor | None) -> Tensor | None:
    """What enters this rank's only link, from states gathered one a rank; None: nothing does."""
    if not plan.takers:
        return None
    (link,) = plan.takers
    if _is_half(plan, gathered):
        return gathered[plan.chain.slots[link - 1]]
    return _prefixes(Scan(plan, {}, log_decay), gathered)[link]


def _is_half(plan: ScanPlan, gathered: Tensor) -> bool:
    """Whether each entry is one of two gathered messages, which need not be copied out of them."""
    return plan.has_one_source and len(gathered) * plan.chain.most_givers <= 2


def _prefix(scan: Scan, link: int, messages: Tensor) -> Tensor:
    """What enters a link, by Horner's rule over the links before it that hold its document."""
    first, slots = scan.plan.first_source(link), scan.chain.slots
    entry = scan.state_in(messages[slots[first]])
    for index in range(first + 1, link):
        item = scan.unpack(index, messages[slots[index]], with_known=True)
        entry = item.state + decayed(entry, item.log_transition)
    # A view would hold every rank's states in memory for as long as this one is wanted.
    return entry.clone() if first == link - 1 and len(messages) > 2 else entry


def _report_saved(plan: ScanPlan) -> None:
    """Bytes that the all_gather would have received for heads that go to the neighbour alone."""
    gathered = (plan.chain.world_size - 1) * plan.chain.most_givers
    saved = (gathered - len(plan.takers)) * plan.head_bytes * len(plan.near_heads)
    comm.report_saved("all_gather", saved)


def _joined(near: list[int], nears: Tensor, far: list[int], fars: Tensor) -> Tensor:
    """One state of all heads from two of some heads each."""
    state = nears.new_empty(nears.shape[0], len(near) + len(far), *nears.shape[2:])
    for heads, part in ((near, nears), (far, fars)):
        put_heads(state, heads, part)
    return state
