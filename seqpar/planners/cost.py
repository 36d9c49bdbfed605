"""What a group of devices costs: time and memory of the sequences it takes, at its degree.

A group of degree d that runs documents of s tokens, with one exchange strategy, takes

    ms = (Σ_kinds Σ_s (quadratic s² + linear s)) / d  +  fixed
         + (1 - overlap) · (bytes_per_token + (d-1) · peer_bytes_per_token) · Σ s / (d · bandwidth)
         + latency                                                  (the last two lines: d > 1)

which is FlexSP's model (arXiv 2412.01523, section 4 and appendix A) with the layer kinds told
apart and the bandwidth taken by degree *and* placement. Softmax layers are quadratic, state layers
and projections linear. Each device holds Σ s / d tokens of activations.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from seqpar.errors import PlanError
from seqpar.planners.cost_checks import check_constants, fields_of, rows_of

__all__ = ["CostModel", "DegreeCost", "Exchange", "LayerCost", "Link"]

GIB = 1024**3
LEAST_MS = 1e-9
"""Of one token alone: searches halve times, and end nowhere near 0."""

STRATEGIES = ("ulysses", "ring", "usp", "gather", "state", "halo")


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One kind of layer, all layers of the kind together: ms per token² and ms per token."""

    kind: str
    quadratic_ms: float = 0.0
    linear_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Link:
    """What one group gets from the wires when it has this degree and spans this many nodes.

    `gib_per_s` is per device, in 2^30 bytes a second; `latency_ms` is what one micro-batch pays
    at this degree however few tokens it has.
    """

    degree: int
    nodes: int = 1
    gib_per_s: float
    latency_ms: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A strategy's bytes: per token of the group, forward and backward, over all layers.

    Each device sends `(bytes_per_token + (d-1) * peer_bytes_per_token) * tokens / d`: an
    all-to-all has the first term, a ring or an all-gather of keys and values the second.
    `overlap` is the share of that time hidden behind computation. `heads`, if given, limits the
    degree to its divisors (Ulysses); `max_degree` limits it outright.
    """

    strategy: str
    bytes_per_token: float = 0.0
    peer_bytes_per_token: float = 0.0
    overlap: float = 0.0
    heads: int | None = None
    max_degree: int | None = None

    def takes(self, degree: int) -> bool:
        """Whether the strategy can run at the degree at all."""
        if self.max_degree is not None and degree > self.max_degree:
            return False
        return self.heads is None or self.heads % degree == 0


class DegreeCost(NamedTuple):
    """One degree's line: ms = quadratic Σs² + linear Σs + fixed; capacity in tokens a group."""

    degree: int
    strategy: str
    quadratic: float
    linear: float
    fixed: float
    capacity: int


@dataclass(frozen=True, kw_only=True)
class CostModel:
    """Constants of one model on one kind of device; `calibrate.fit` measures them.

    Args:
        name: what to call it in reports.
        layers: compute by layer kind.
        fixed_ms: what a group pays once a micro-batch.
        exchanges: the strategies on offer at degrees over 1; the cheapest serves a group.
        links: bandwidth by degree and nodes spanned.
        memory_bytes_per_token: activations that one token leaves on its device.
        memory_fixed_bytes: what each device holds whatever it runs.
        memory_sharded_bytes: model states that are sharded over all devices of the cluster (ZeRO).
        errors: standard errors and residuals of a fit, by name; empty for published constants.

    Raises:
        PlanError: a constant that is negative, not finite, or missing.
    """

    name: str
    layers: tuple[LayerCost, ...]
    fixed_ms: float = 0.0
    exchanges: tuple[Exchange, ...] = ()
    links: tuple[Link, ...] = ()
    memory_bytes_per_token: float
    memory_fixed_bytes: float = 0.0
    memory_sharded_bytes: float = 0.0
    errors: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "exchanges", tuple(self.exchanges))
        object.__setattr__(self, "links", tuple(self.links))
        check_constants(self, "cost model")
        if not self.layers:
            raise PlanError("a cost model needs at least one layer kind, got layers=()")
        if self.memory_bytes_per_token <= 0:
            raise PlanError("memory_bytes_per_token must be over 0: a token always takes memory")
        for part in (*self.layers, *self.exchanges, *self.links):
            check_constants(part, type(part).__name__)
        if self._quadratic + self._linear + self.fixed_ms < LEAST_MS:
            raise PlanError(f"a token must take time: layers and fixed_ms give under {LEAST_MS} ms")
        for link in self.links:
            if link.degree < 2 or link.nodes < 1 or link.gib_per_s <= 0:
                raise PlanError(f"a link has degree >= 2, nodes >= 1, gib_per_s > 0, got {link}")
        for exchange in self.exchanges:
            if exchange.strategy not in STRATEGIES:
                known = ", ".join(STRATEGIES)
                raise PlanError(f"unknown strategy {exchange.strategy!r}: choose one of {known}")
            if exchange.overlap > 1:
                raise PlanError(f"overlap is a share of 1, got {exchange.overlap} in {exchange}")
        if self.exchanges and not self.links:
            raise PlanError("a cost model with exchanges needs links (bandwidth by degree)")

    # -- time --------------------------------------------------------------------------------

    def group_ms(
        self,
        lengths: Sequence[int],
        degree: int,
        *,
        nodes: int | None = None,
        strategy: str | None = None,
    ) -> float:
        """Milliseconds of one group that runs documents of these lengths (tokens).

        `nodes`: how many nodes the group spans (default: the fewest measured at that degree).
        `strategy`: default the cheapest on offer.
        """
        if degree < 1:
            raise PlanError(f"a degree is at least 1, got {degree}")
        squares, tokens = sum(s * s for s in lengths), sum(lengths)
        lines = self.lines(degree, nodes=nodes)
        if strategy is not None:
            lines = [line for line in lines if line[0] == strategy]
            if not lines:
                raise PlanError(f"{self.name} has no cost for {strategy!r} at degree {degree}")
        if not lines:
            raise PlanError(f"{self.name} has no strategy that runs at degree {degree}")
        return min(a * squares + b * tokens + c for _, a, b, c in lines)

    def lines(
        self, degree: int, *, nodes: int | None = None
    ) -> list[tuple[str, float, float, float]]:
        """(strategy, ms per Σs², ms per Σs, fixed ms) for each strategy that takes the degree."""
        quadratic = self._quadratic / degree
        linear = self._linear / degree
        if degree == 1:
            return [("local", quadratic, linear, self.fixed_ms)]
        found = []
        for exchange in self.exchanges:
            if not exchange.takes(degree):
                continue
            link = self.link(degree, nodes)
            sent = exchange.bytes_per_token + (degree - 1) * exchange.peer_bytes_per_token
            ms = (1 - exchange.overlap) * sent / degree / (link.gib_per_s * GIB) * 1e3
            found.append(
                (exchange.strategy, quadratic, linear + ms, self.fixed_ms + link.latency_ms)
            )
        return found

    def link(self, degree: int, nodes: int | None = None) -> Link:
        """The link of that degree and placement, else the nearest measured one at or above it."""
        fitting = sorted(
            (link for link in self.links if nodes is None or (link.nodes > 1) == (nodes > 1)),
            key=lambda link: (link.degree, link.nodes),
        ) or sorted(self.links, key=lambda link: (link.degree, link.nodes))
        return next((link for link in fitting if link.degree >= degree), fitting[-1])

    @cached_property
    def _quadratic(self) -> float:
        return math.fsum(layer.quadratic_ms for layer in self.layers)

    @cached_property
    def _linear(self) -> float:
        return math.fsum(layer.linear_ms for layer in self.layers)

    # -- memory ------------------------------------------------------------------------------

    def tokens_per_device(self, memory_bytes: float, devices: int) -> int:
        """How many tokens of activations fit on one device of a cluster of that many."""
        free = memory_bytes - self.memory_fixed_bytes - self.memory_sharded_bytes / devices
        return max(0, math.floor(free / self.memory_bytes_per_token + 1e-9))

    # -- JSON --------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: object) -> CostModel:
        """Read what `to_json` wrote.

        Every constant has to be there, 0 or not: one that was forgotten would count as free.

        Raises:
            PlanError: not an object, a constant missing, negative, unknown or not a number.
        """
        values = fields_of(cls, data, "cost model")
        for name, part in (("layers", LayerCost), ("exchanges", Exchange), ("links", Link)):
            rows = rows_of(values, name)
            values[name] = tuple(part(**fields_of(part, row, part.__name__)) for row in rows)
        return cls(**values)

    @classmethod
    def load(cls, path: str) -> CostModel:
        """Read a JSON cost file; PlanError names the file and what is wrong with it."""
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
        except OSError as error:
            raise PlanError(f"cannot read the cost file {path}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise PlanError(f"the cost file {path} is not JSON: {error}") from error
        try:
            return cls.from_json(data)
        except PlanError as error:
            raise PlanError(f"cost file {path}: {error}") from error

    def renamed(self, name: str) -> CostModel:
        """The same constants under another name."""
        return replace(self, name=name)
