"""The problem of one step: lengths, a cluster, a cost model. Frozen values, JSON both ways."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from seqpar.errors import InfeasiblePlanError, PlanError
from seqpar.planners.cost import GIB, CostModel, DegreeCost

__all__ = ["Cluster", "ScatterProblem"]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """The devices to plan for.

    Args:
        devices: how many.
        memory_bytes: what a plan may use of each device's memory.
        devices_per_node: devices that share a node's fast links (default: all of them).
        degrees: allowed group sizes (default: powers of two up to `devices`). A degree that fits
            in a node must divide the node's devices, a larger one must be a multiple of them, so
            that no group straddles nodes without need.

    Raises:
        PlanError: counts below 1, or a degree that cannot be placed.
    """

    devices: int
    memory_bytes: float
    devices_per_node: int = 0
    degrees: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("devices", "devices_per_node"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise PlanError(f"{name} must be an integer, got {value!r}")
        if self.devices < 1:
            raise PlanError(f"a cluster has at least 1 device, got {self.devices}")
        if self.devices_per_node < 0:
            raise PlanError(f"devices_per_node must be at least 1, got {self.devices_per_node}")
        if not math.isfinite(self.memory_bytes) or self.memory_bytes <= 0:
            raise PlanError(f"memory_bytes must be over 0, got {self.memory_bytes}")
        per_node = min(self.devices_per_node or self.devices, self.devices)
        object.__setattr__(self, "devices_per_node", per_node)
        object.__setattr__(self, "degrees", self._checked_degrees())

    def _checked_degrees(self) -> tuple[int, ...]:
        per_node = self.devices_per_node
        if not self.degrees:
            powers = [2**i for i in range(self.devices.bit_length())]
            return tuple(d for d in powers if self._placeable(d))
        for degree in self.degrees:
            if isinstance(degree, bool) or not isinstance(degree, int):
                raise PlanError(f"a degree is an integer, got {degree!r}")
            if not 1 <= degree <= self.devices:
                raise PlanError(f"degree {degree} is not within 1..{self.devices} devices")
            if not self._placeable(degree):
                raise PlanError(
                    f"degree {degree} does not fit nodes of {per_node} devices: take a divisor "
                    f"of {per_node} or a multiple of it"
                )
        return tuple(sorted(set(self.degrees)))

    def _placeable(self, degree: int) -> bool:
        per_node = self.devices_per_node
        return per_node % degree == 0 if degree <= per_node else degree % per_node == 0

    def larger_degrees(self, degree: int) -> Iterator[int]:
        """Group sizes over `degree`: those that its nodes allow, then those of larger clusters.

        A larger cluster has more nodes of this size, or is one larger node where this one is one.
        """
        yield from (d for d in range(degree + 1, self.devices + 1) if self._placeable(d))
        node = 1 if self.nodes == 1 else self.devices_per_node
        sizes = (node * 2**i for i in range(MAX_DEGREE.bit_length()))
        yield from (size for size in sizes if self.devices < size <= MAX_DEGREE)

    @property
    def nodes(self) -> int:
        """How many nodes, the last perhaps not full."""
        return -(-self.devices // self.devices_per_node)

    def nodes_spanned(self, degree: int) -> int:
        """How many nodes a well-placed group of that degree touches."""
        return -(-degree // self.devices_per_node)

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return asdict(self) | {"degrees": list(self.degrees)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Cluster:
        """Read what `to_json` wrote."""
        try:
            return cls(**{**data, "degrees": tuple(data.get("degrees", ()))})
        except TypeError as error:
            raise PlanError(f"not a cluster: {error}") from error


@dataclass(frozen=True)
class ScatterProblem:
    """One step's sequences, and what they may be scattered over.

    Args:
        lengths: tokens of each sequence; plans name sequences by their index here.
        cluster, cost: where they run, and what that costs.
        context_tokens: the longest document of the whole run, if longer than these; a fixed
            degree has to hold it. It bears on the fixed-degree baseline alone.

    Raises:
        PlanError: no lengths, or one that is not an integer of at least 1.
        InfeasiblePlanError: a sequence that no group can hold.
    """

    lengths: tuple[int, ...]
    cluster: Cluster
    cost: CostModel
    context_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", _checked_lengths(self.lengths))
        longest = max(self.lengths)
        available = max((line.capacity for line in self.degree_costs), default=0)
        if longest > available:
            raise self._too_long(longest, available)

    @cached_property
    def tokens_per_device(self) -> int:
        """The hard limit: tokens of activations that one device can hold."""
        return self.cost.tokens_per_device(self.cluster.memory_bytes, self.cluster.devices)

    @cached_property
    def degree_costs(self) -> tuple[DegreeCost, ...]:
        """The cost line of each usable degree, ascending, with its usual strategy.

        Where several strategies serve a degree, the line is that of the one which is cheapest
        for a group filled to half its memory; `strategy_of` decides for an actual group.
        """
        found = []
        for degree in self.cluster.degrees:
            capacity = degree * self.tokens_per_device
            lines = self.cost.lines(degree, nodes=self.cluster.nodes_spanned(degree))
            if lines and capacity:
                best = min(lines, key=lambda line: line[2] * capacity / 2 + line[3])
                found.append(DegreeCost(degree, *best, capacity))
        return tuple(found)

    def strategy_of(self, sequences: Iterable[int], degree: int) -> tuple[str, float]:
        """The cheapest strategy for these sequences (indices) at that degree, and its ms."""
        lengths = [self.lengths[index] for index in sequences]
        squares, tokens = sum(s * s for s in lengths), sum(lengths)
        lines = self.cost.lines(degree, nodes=self.cluster.nodes_spanned(degree))
        ms, _, name = min(
            (a * squares + b * tokens + c, rank, name) for rank, (name, a, b, c) in enumerate(lines)
        )
        return name, ms

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` reads back to an equal value."""
        return {
            "lengths": list(self.lengths),
            "cluster": self.cluster.to_json(),
            "cost": self.cost.to_json(),
            "context_tokens": self.context_tokens,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ScatterProblem:
        """Read what `to_json` wrote."""
        try:
            cluster, cost = Cluster.from_json(data["cluster"]), CostModel.from_json(data["cost"])
            return cls(tuple(data["lengths"]), cluster, cost, data.get("context_tokens"))
        except KeyError as error:
            raise PlanError(f"not a scatter problem: it lacks {error}") from error
        except TypeError as error:
            raise PlanError(f"not a scatter problem: {error}") from error

    def _degree_that_holds(self, longest: int, degree: int) -> tuple[int, int] | None:
        """The next degree whose group holds the sequence, and the devices that it takes.

        More devices also share the sharded states among more.
        """
        cluster = self.cluster
        for larger in cluster.larger_degrees(degree):
            devices = max(larger, cluster.devices)
            tokens = self.cost.tokens_per_device(cluster.memory_bytes, devices)
            nodes = cluster.nodes_spanned(larger)
            if larger * tokens >= longest and self.cost.lines(larger, nodes=nodes):
                return larger, devices
        return None

    def _too_long(self, longest: int, available: int) -> InfeasiblePlanError:
        cost, cluster = self.cost, self.cluster
        degree = max((line.degree for line in self.degree_costs), default=max(cluster.degrees))
        fixed = cost.memory_fixed_bytes + cost.memory_sharded_bytes / cluster.devices
        needed = -(-longest // degree) * cost.memory_bytes_per_token + fixed
        changes = [
            f"give each device {_rounded_up(needed / GIB)} GiB "
            f"(now {cluster.memory_bytes / GIB:.4g})"
        ]
        larger, devices = self._degree_that_holds(longest, degree) or (0, 0)
        if larger and devices == cluster.devices:
            changes.append(f"allow groups of {larger} devices (now at most {degree})")
        elif larger:
            changes.append(f"take {larger} devices as one group (now {cluster.devices} in all)")
        if available:
            changes.append(f"cut the sequence to {available} tokens")
        return InfeasiblePlanError(
            f"sequence {self.lengths.index(longest)} has {longest} tokens, but the largest group "
            f"({degree} devices of {self.tokens_per_device} tokens) holds {available}: "
            + ", or ".join(changes),
            needed_tokens=longest,
            available_tokens=available,
        )


MAX_DEGREE = 2**16


def _rounded_up(number: float) -> str:
    """Four digits of a positive number, and not less than it."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 3)
    return f"{math.ceil(number / unit) * unit:.4g}"


def _checked_lengths(lengths: Iterable[int]) -> tuple[int, ...]:
    checked = []
    for index, value in enumerate(lengths):
        try:
            length = int(value)
        except (TypeError, ValueError, OverflowError) as error:
            raise PlanError(f"length {index} is not a number: {value!r}") from error
        if length != value or length < 1:
            raise PlanError(f"length {index} must be an integer of at least 1, got {value!r}")
        checked.append(length)
    if not checked:
        raise PlanError("there are no lengths to plan: a problem needs at least one sequence")
    return tuple(checked)
