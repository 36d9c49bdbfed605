"""How long an exchange of states takes: a model from bytes, hops and link figures.

Every estimate is latency times the messages that follow one another, plus bytes over bandwidth.
It knows nothing of tensors, so it runs on a laptop; the operators ask it which exchange to use.

W ranks; a state of S bytes leaves each; it travels over `reach` links at most; a share f of its
heads has not decayed within a link (f = 1 without decay); α latency, β bandwidth.

    all_gather       α_c + (W - 2) η + (W - 1) f S / β     (+ 1 hop of (1 - f) S)
      peers' memory  α_c + (W - 2) η + reach S / β         (1 S if f = 0)
    chain            reach (α + f S / β)                   (1 hop if f = 0)
    pipelined_chain  (reach - 1 + n) (α + f S / (n β))     n slices
    log_step         ⌈log2(reach + 1)⌉ α + ...             S in the first round, f S in the others
    all_to_all       2 (α_c + (W - 2) η) + tokens (W - 1) / W bytes / β, most loaded rank
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from seqpar.errors import PlanError

__all__ = [
    "ETHERNET_LOOPBACK",
    "INFINIBAND_NDR",
    "NVLINK_H200",
    "PEERS_H200",
    "ExchangeChoice",
    "ExchangeProblem",
    "Link",
    "choose_exchange",
    "exchange_ms",
]


@dataclass(frozen=True)
class Link:
    """What joins the ranks of a group."""

    name: str
    message_us: float
    """α: latency of one point-to-point message."""
    collective_us: float
    """α_c: latency of a collective between two ranks."""
    hop_us: float
    """η: what each further rank adds to a collective's latency."""
    gigabytes_per_s: float
    """β: one way, each rank."""
    message_host_us: float = 0.0
    """How much longer than a collective the host takes to queue a message; choices count it."""
    reads_peers: bool = False
    """An all_gather moves, whole, the states that are wanted and no others."""

    def transfer_ms(self, num_bytes: float) -> float:
        """Bytes over bandwidth."""
        return num_bytes / (self.gigabytes_per_s * 1e6)


NVLINK_H200 = Link("NVLink (NV18, as of 2 H200s)", 12.0, 25.0, 3.0, 264.0, message_host_us=50.0)
"""Two H200s, NCCL 2.28.9, torch 2.11, in CUDA graphs: all-gathers of 2 to 256 MiB within a quarter,
over four of 2 and 32 MiB within a tenth; messages of 2 MiB within a sixth, of 32 MiB within a third
(docs/state.md). η is assumed."""

PEERS_H200 = Link("memory of peers (NV18, as of 2 H200s)", 12.0, 8.5, 2.0, 264.0, 100.0, True)
"""The same with `comm.share_memory`: an all-gather of 2 MiB by one launch took 16.5 us."""

INFINIBAND_NDR = Link("InfiniBand NDR, 400 Gb/s a GPU", 25.0, 40.0, 8.0, 45.0, message_host_us=50.0)
"""Datasheet bandwidth less a tenth, and latencies assumed; measure your own cluster."""

ETHERNET_LOOPBACK = Link("gloo over loopback", 300.0, 400.0, 100.0, 1.0)
"""Processes of one host through gloo, for tests and demonstrations."""

NAMES = ("all_gather", "chain", "pipelined_chain", "log_step", "all_to_all")


@dataclass(frozen=True)
class ExchangeProblem:
    """One layer, one direction, the most loaded rank.

    Raises:
        PlanError: a count under 1, or shares outside 0 to 1.
    """

    world_size: int
    reach: int
    """The most links that one state travels; 0 if no document crosses ranks."""
    state_bytes: int
    """B * H * K * V * 4, and the transitions if they travel."""
    tokens: int
    """Of the rank with the most tokens, times the batch."""
    token_bytes: int
    """Of one token's q, k, v and o: H * (2 K + 2 V) * item size."""
    heads: int
    far_share: float = 1.0
    """Heads that have not decayed within a link."""
    links_per_rank: int = 1
    """2 for zigzag."""
    slices: int = 8
    heads_apart: bool = True
    """Whether heads can be computed on different ranks."""

    def __post_init__(self) -> None:
        if min(self.world_size, self.heads, self.links_per_rank, self.slices) < 1:
            raise PlanError(f"counts must be at least 1: {self}")
        if not 0 <= self.far_share <= 1 or min(self.reach, self.tokens, self.state_bytes) < 0:
            raise PlanError(
                f"far_share must be in 0..1, reach, tokens and bytes not under 0: {self}"
            )


@dataclass(frozen=True)
class ExchangeChoice:
    """The exchange to use, and what every one of them was estimated to take. Printable."""

    exchange: str
    estimates_ms: dict[str, float]
    problem: ExchangeProblem
    link: Link

    def __str__(self) -> str:
        p = self.problem
        head = (
            f"{self.exchange}: {p.world_size} ranks over {self.link.name}, "
            f"{p.state_bytes / 2**20:.2f} MiB of state a link, reach {p.reach}, "
            f"{p.tokens} tokens a rank, {p.far_share:.0%} of heads beyond the neighbour"
        )
        width = max(map(len, self.estimates_ms))
        rows = [f"  {name:<{width}}  {ms:.3f} ms" for name, ms in self.estimates_ms.items()]
        return "\n".join([head, *rows])


def choose_exchange(problem: ExchangeProblem, link: Link) -> ExchangeChoice:
    """The exchange with the least estimate; of equals, the first in the table above."""
    names = [name for name in NAMES if problem.heads_apart or name != "all_to_all"]
    estimates = {
        name: exchange_ms(name, problem, link) + _host_ms(name, problem, link) for name in names
    }
    return ExchangeChoice(min(estimates, key=estimates.__getitem__), estimates, problem, link)


def exchange_ms(exchange: str, problem: ExchangeProblem, link: Link) -> float:
    """Estimated time of one exchange in one direction, nothing hidden behind local work.

    Raises:
        PlanError: no exchange of that name.
    """
    if exchange not in NAMES:
        raise PlanError(f"no exchange {exchange!r}: the exchanges are {', '.join(NAMES)}")
    if problem.world_size == 1:
        return 0.0
    if exchange == "all_to_all":
        return _all_to_all_ms(problem, link)
    if problem.reach == 0:
        return 0.0
    return {
        "all_gather": _all_gather_ms,
        "chain": _chain_ms,
        "pipelined_chain": _pipelined_ms,
        "log_step": _log_step_ms,
    }[exchange](problem, link)


def _host_ms(exchange: str, problem: ExchangeProblem, link: Link) -> float:
    """What a rank's host takes longer than with one collective."""
    if problem.reach == 0 or problem.world_size == 1:
        return 0.0
    rounds = {"chain": 1, "pipelined_chain": problem.slices, "log_step": _rounds(problem)}
    return rounds.get(exchange, 0) * link.message_host_us / 1e3


def _rounds(problem: ExchangeProblem) -> int:
    """Of log_step."""
    return math.ceil(math.log2(problem.reach + 1)) if _far_share(problem) > 0 else 1


def _far_share(problem: ExchangeProblem) -> float:
    """Only a state that passes a link can be cut off there."""
    return problem.far_share if problem.reach > 1 else 1.0


def _collective_ms(problem: ExchangeProblem, link: Link) -> float:
    return (link.collective_us + (problem.world_size - 2) * link.hop_us) / 1e3


def _all_gather_ms(problem: ExchangeProblem, link: Link) -> float:
    far = _far_share(problem)
    if link.reads_peers:
        hops = problem.reach if far > 0 else 1
        states = problem.links_per_rank * min(problem.world_size - 1, hops * problem.links_per_rank)
        return _collective_ms(problem, link) + link.transfer_ms(states * problem.state_bytes)
    gathered = (problem.world_size - 1) * problem.links_per_rank * far * problem.state_bytes
    neighbour = (1 - far) * problem.state_bytes
    latency = max(
        _collective_ms(problem, link) if far > 0 else 0.0,
        link.message_us / 1e3 if far < 1 else 0.0,
    )
    return latency + link.transfer_ms(gathered + neighbour)


def _chain_ms(problem: ExchangeProblem, link: Link) -> float:
    far, hop = _far_share(problem), link.message_us / 1e3
    if far == 0:
        return hop + link.transfer_ms(problem.state_bytes)
    near = link.transfer_ms((1 - far) * problem.state_bytes)
    return near + problem.reach * (hop + link.transfer_ms(far * problem.state_bytes))


def _pipelined_ms(problem: ExchangeProblem, link: Link) -> float:
    far, hop = _far_share(problem), link.message_us / 1e3
    if far == 0:
        return _chain_ms(problem, link)
    near = link.transfer_ms((1 - far) * problem.state_bytes)
    piece = link.transfer_ms(far * problem.state_bytes / problem.slices)
    return near + (problem.reach - 1 + problem.slices) * (hop + piece)


def _log_step_ms(problem: ExchangeProblem, link: Link) -> float:
    far, hop = _far_share(problem), link.message_us / 1e3
    sent = problem.state_bytes * problem.links_per_rank
    later = (_rounds(problem) - 1) * (hop + link.transfer_ms(far * sent))
    return hop + link.transfer_ms(sent) + later


def _all_to_all_ms(problem: ExchangeProblem, link: Link) -> float:
    ranks = problem.world_size
    heaviest = math.ceil(problem.heads / ranks) * ranks / problem.heads
    moved = problem.tokens * problem.token_bytes * (ranks - 1) / ranks * heaviest
    return 2 * _collective_ms(problem, link) + link.transfer_ms(moved)
