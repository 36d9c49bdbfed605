"""The exchange in rounds of doubling distance.

Legend: B batch, H heads, K key dim, V value dim, L links, W ranks.
"""

from __future__ import annotations

from torch import Tensor

from seqpar import comm
from seqpar.ops.state_chain import LinkState, decayed
from seqpar.ops.state_scan import Entries, Scan, ScanPlan, put_heads, select_heads
from seqpar.ops.steps import Steps, Swap

__all__ = ["log_step_states"]


def log_step_states(scan: Scan) -> Steps[Entries]:
    """Rounds of doubling distance: after round i a link knows the 2^i links before it.

    A link sends the sum of the 2^i links that end with it, its own among them, to the link 2^i
    after it, wherever its document still goes on. Bytes received per rank: for each of its links
    and each round in which something reaches it from another rank, 4 * B * (H' * K * V + H if the
    decay is per token), H' the heads that have not decayed on the way.

    Source: Hillis and Steele, Data parallel algorithms, 1986; exclusive form.
    """
    plan, links = scan.plan, scan.chain.links
    before: dict[int, LinkState] = {}
    distance = 1
    while distance < len(links):
        sends: list[tuple[int, Tensor]] = []
        recvs: list[tuple[int, Tensor]] = []
        arriving: list[tuple[int, list[int] | None, Tensor]] = []
        for index in plan.own_links:
            if plan.reaches(index, index + distance):
                heads = plan.heads_between(index, index + distance)
                if heads is None or heads:
                    part = scan.of_heads(heads)
                    message = part.pack(_inclusive(scan, index, before.get(index), heads))
                    sends.append((links[index + distance].rank, message))
            if plan.reaches(index - distance, index):
                heads = plan.heads_between(index - distance, index)
                if links[index - distance].rank != plan.rank:
                    _report_saved(plan, heads)
                if heads is None or heads:
                    message = _plan_of(plan, heads).new_message()
                    recvs.append((links[index - distance].rank, message))
                    arriving.append((index, heads, message))
        if sends or recvs:
            yield Swap(sends, recvs)
        for index, heads, message in arriving:
            found = scan.of_heads(heads).unpack(index - distance, message, with_known=False)
            before[index] = _extended(scan, index, before.get(index), found, heads, distance)
        distance *= 2
    return {index: item.state for index, item in before.items()}


def _plan_of(plan: ScanPlan, heads: list[int] | None) -> ScanPlan:
    return plan if heads is None else plan.of_heads(heads)


def _report_saved(plan: ScanPlan, heads: list[int] | None) -> None:
    if heads is not None:
        comm.report_saved("log_step", plan.head_bytes * (plan.state_shape[1] - len(heads)))


def _inclusive(
    scan: Scan, link: int, before: LinkState | None, heads: list[int] | None
) -> LinkState:
    """The links that end with this one, as one: its own state and what it passes on."""
    own = scan.own[link]
    state, transition = own.state, own.log_transition
    if before is not None and scan.chain.links[link].passes:
        state = state + decayed(before.state, scan.transition(link))
        if transition is not None and before.log_transition is not None:
            transition = transition + before.log_transition
    if heads is None:
        return LinkState(state, transition)
    return LinkState(select_heads(state, heads), None)


def _extended(
    scan: Scan,
    link: int,
    before: LinkState | None,
    found: LinkState,
    heads: list[int] | None,
    distance: int,
) -> LinkState:
    """The links before this one, and the ones before those."""
    if before is None:
        return found
    if scan.plan.carries:
        gap, moved = before.log_transition, decayed(found.state, before.log_transition)
        total = None if gap is None or found.log_transition is None else gap + found.log_transition
        return LinkState(before.state + moved, total)
    gap = scan.known(range(link - distance + 1, link))
    if heads is None:
        return LinkState(before.state + decayed(found.state, gap), None)
    state = before.state.clone()
    added = decayed(found.state, None if gap is None else select_heads(gap, heads))
    put_heads(state, heads, select_heads(state, heads) + added)
    return LinkState(state, None)
