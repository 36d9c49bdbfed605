"""How states travel along the chain: interchangeable exchanges, each a generator of requests.

Legend: B batch, H heads, K key dim, V value dim, L links, W ranks.

Each takes the links' own summaries (S_l, G_l) and gives, for every link of this rank that takes,
what enters it: E_l = Σ_(p<l) exp(Σ_(p<i<l) G_i) S_p, over the links that hold its document.

| exchange        | hops one after another | bytes received by a rank, contiguous layout  |
| all_gather      | 1                      | (W - 1) states, and transitions if not known |
| chain           | W - 1                  | 1 state                                      |
| pipelined_chain | W - 1, of a slice each | 1 state                                      |
| log_step        | log2 W                 | up to log2 W states, and transitions         |

Where the decays are known to all (fixed decay) and `Scan.host_log_decay` is set, heads whose decay
over a whole link falls under the floor stop there: `all_gather` sends them to the next link only,
`log_step` leaves them out of a round, and the chains send them on without waiting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from seqpar import comm
from seqpar.kernels.entry_product import LOG_FLOOR
from seqpar.ops.state_chain import LinkState, StateChain, decayed
from seqpar.ops.steps import AllGather, Steps, Swap, Together

__all__ = [
    "EXCHANGES",
    "Entries",
    "Scan",
    "all_gather_states",
    "chain_states",
    "log_step_states",
    "pipelined_chain_states",
]

Entries = dict[int, Tensor]
"""By link index: the state that enters. Links that take nothing are absent."""

NUM_SLICES = 8
"""Slices of the pipelined chain; fewer if the key dim is smaller."""


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
            return None if x is None else _select(x, heads)

        known = self.known

        def cut_link(item: LinkState) -> LinkState:
            return LinkState(_select(item.state, heads), cut(item.log_transition))

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

    def unpack(self, link: int, message: Tensor) -> LinkState:
        """The summary of a link from its message."""
        size = self.like.state.numel()
        state = message[:size].view(self.like.state.shape)
        if not self._carries_transition:
            return LinkState(state, None if self.known is None else self.known(link))
        assert self.like.log_transition is not None
        return LinkState(state, message[size:].view(self.like.log_transition.shape))

    def new_message(self, *leading: int) -> Tensor:
        """Uninitialised memory for messages."""
        return torch.empty(*leading, self.numel, dtype=self.like.state.dtype, device=self.device)


# -- all-gather -------------------------------------------------------------------------------


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
    places = _places_of_givers(chain)
    given = [scan.pack(scan.own[link]) for link in scan.own_links if link in places]
    missing = max(places.values()) + 1 - len(given)
    given += [scan.new_message().zero_() for _ in range(missing)]
    message = torch.stack(given) if len(given) > 1 else given[0][None]

    def finish(gathered: Tensor) -> Entries:
        def summary(link: int) -> LinkState:
            return scan.unpack(link, gathered[chain.links[link].rank, places[link]])

        takers = [link for link in scan.own_links if chain.links[link].takes]
        return {link: _prefix(chain, link, summary) for link in takers}

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


def _report_saved(scan: Scan, near: list[int]) -> None:
    """Bytes that the all_gather would have received for heads that go to the neighbour alone."""
    places = _places_of_givers(scan.chain)
    width = max(places.values()) + 1
    state_bytes = scan.like.state[:, 0].numel() * scan.like.state.element_size() * len(near)
    taken = sum(scan.chain.links[link].takes for link in scan.own_links)
    gathered = (scan.chain.world_size - 1) * width
    comm.report_saved("all_gather", (gathered - taken) * state_bytes)


def _select(x: Tensor, heads: list[int]) -> Tensor:
    """x[:, heads], a view if they are consecutive."""
    if heads and heads[-1] - heads[0] + 1 > len(heads):
        return x[:, heads]
    return x[:, heads[0] : heads[-1] + 1] if heads else x[:, :0]


def _joined(near: list[int], nears: Tensor, far: list[int], fars: Tensor) -> Tensor:
    """One state of all heads from two of some heads each."""
    state = nears.new_empty(nears.shape[0], len(near) + len(far), *nears.shape[2:])
    for heads, part in ((near, nears), (far, fars)):
        state[:, heads] = part
    return state


# -- chains -----------------------------------------------------------------------------------


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
        x = x if self.heads is None else _select(x, self.heads)
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


# -- log-step scan ----------------------------------------------------------------------------


def log_step_states(scan: Scan) -> Steps[Entries]:
    """Rounds of doubling distance: after round i a link knows the 2^i links before it.

    A link sends the sum of the 2^i links that end with it, its own among them, to the link 2^i
    after it, wherever its document still goes on. Bytes received per rank: for each of its links
    and each round in which something reaches it, 4 * B * (H' * K * V + H if the decay is per
    token), H' the heads that have not decayed on the way.

    Source: Hillis and Steele, Data parallel algorithms, 1986; exclusive form.
    """
    links = scan.chain.links
    before: dict[int, LinkState] = {}
    distance = 1
    while distance < len(links):
        sends: list[tuple[int, Tensor]] = []
        recvs: list[tuple[int, Tensor]] = []
        arriving: list[tuple[int, list[int] | None, Tensor]] = []
        for index in scan.own_links:
            if scan.reaches(index, index + distance):
                heads = _heads_or_skip(scan, index, index + distance, saved=False)
                if heads is None or heads:
                    part = scan.of_heads(heads)
                    message = part.pack(_inclusive(scan, index, before.get(index), heads))
                    sends.append((links[index + distance].rank, message))
            if scan.reaches(index - distance, index):
                heads = _heads_or_skip(scan, index - distance, index, saved=True)
                if heads is None or heads:
                    message = scan.of_heads(heads).new_message()
                    recvs.append((links[index - distance].rank, message))
                    arriving.append((index, heads, message))
        if sends or recvs:
            yield Swap(sends, recvs)
        for index, heads, message in arriving:
            found = scan.of_heads(heads).unpack(index - distance, message)
            before[index] = _extended(scan, index, before.get(index), found, heads, distance)
        distance *= 2
    return {index: item.state for index, item in before.items()}


def _heads_or_skip(scan: Scan, source: int, target: int, *, saved: bool) -> list[int] | None:
    heads = scan.heads_between(source, target)
    if saved and heads is not None:
        state = scan.like.state
        left_out = state.shape[1] - len(heads)
        comm.report_saved("log_step", state[:, 0].numel() * state.element_size() * left_out)
    return heads


def _inclusive(
    scan: Scan, link: int, before: LinkState | None, heads: list[int] | None
) -> LinkState:
    """The links that end with this one, as one: its own state and what it passes on."""
    own = scan.own[link]
    state, transition = own.state, own.log_transition
    if before is not None and scan.chain.links[link].passes:
        state = state + decayed(before.state, transition)
        if transition is not None and before.log_transition is not None:
            transition = transition + before.log_transition
    if heads is None:
        return LinkState(state, transition)
    return LinkState(_select(state, heads), None)


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
    if scan.known is None:
        gap, moved = before.log_transition, decayed(found.state, before.log_transition)
        total = None if gap is None or found.log_transition is None else gap + found.log_transition
        return LinkState(before.state + moved, total)
    between = [scan.known(index) for index in range(link - distance + 1, link)]
    gap = None
    for transition in between:
        gap = transition if gap is None or transition is None else gap + transition
    if heads is None:
        return LinkState(before.state + decayed(found.state, gap), None)
    state = before.state.clone()
    state[:, heads] += decayed(found.state, None if gap is None else _select(gap, heads))
    return LinkState(state, None)


EXCHANGES: dict[str, Callable[[Scan], Steps[Entries]]] = {
    "all_gather": all_gather_states,
    "chain": chain_states,
    "pipelined_chain": pipelined_chain_states,
    "log_step": log_step_states,
}
"""By name: every exchange that moves states. `all_to_all` moves tokens: see state_heads."""
