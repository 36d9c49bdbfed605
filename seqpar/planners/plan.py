"""The plan of one step: micro-batches of groups, with what proves how good it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from seqpar.errors import PlanError
from seqpar.planners.batch import SortedBatch
from seqpar.planners.problem import Cluster, ScatterProblem

__all__ = ["Group", "MicroBatch", "ScatterPlan", "build_plan", "place_groups", "to_plan"]


@dataclass(frozen=True)
class Group:
    """Devices that run some of a micro-batch's sequences together.

    `ranks` are global and contiguous; `sequences` are indices into the problem's lengths, in the
    order in which they are packed; `strategy` is "local" at degree 1.
    """

    ranks: tuple[int, ...]
    degree: int
    strategy: str
    sequences: tuple[int, ...]
    predicted_ms: float
    tokens: int


@dataclass(frozen=True)
class MicroBatch:
    """Groups that run at the same time on disjoint ranks; the slowest is the makespan."""

    makespan_ms: float
    groups: tuple[Group, ...]
    lower_bound_ms: float = 0.0

    @property
    def gap(self) -> float:
        """How far the makespan is above its lower bound, as a share of the bound."""
        return _gap(self.makespan_ms, self.lower_bound_ms)


@dataclass(frozen=True)
class ScatterPlan:
    """What every device runs in one step.

    Args:
        micro_batches: run one after the other.
        lower_bound_ms: no plan with these micro-batches takes less (the sum over them of `bound`).
        step_lower_bound_ms: no plan of these sequences takes less, whatever its micro-batches.
        bound: which bound `lower_bound_ms` is: "none", "degree" or "configuration".
        baselines: ms of other ways to plan the same step, by name.
        source: what found the plan: "anytime", "exact" or a baseline's name.
        cut_short: the clock ended the search before its work was done, so that the same problem
            may get another plan next time; not part of equality.
        solve_ms: wall-clock of planning alone, bounds apart; not part of equality.
        bound_ms: wall-clock of the bounds; not part of equality.
    """

    micro_batches: tuple[MicroBatch, ...]
    lower_bound_ms: float = 0.0
    step_lower_bound_ms: float = 0.0
    bound: str = "none"
    baselines: Mapping[str, float] = field(default_factory=dict)
    source: str = "anytime"
    cut_short: bool = field(default=False, compare=False)
    solve_ms: float = field(default=0.0, compare=False)
    bound_ms: float = field(default=0.0, compare=False)

    @property
    def makespan_ms(self) -> float:
        """Predicted milliseconds of the step: the sum over its micro-batches."""
        return math.fsum(batch.makespan_ms for batch in self.micro_batches)

    @property
    def gap(self) -> float:
        """How far the makespan is above `lower_bound_ms`, as a share of the bound."""
        return _gap(self.makespan_ms, self.lower_bound_ms)

    @property
    def step_gap(self) -> float:
        """How far the makespan is above `step_lower_bound_ms`, as a share of the bound."""
        return _gap(self.makespan_ms, self.step_lower_bound_ms)

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """Every distinct tuple of ranks that the plan uses, sorted: what a group pool prepares."""
        return tuple(sorted({g.ranks for batch in self.micro_batches for g in batch.groups}))

    def verify(self, problem: ScatterProblem) -> None:
        """Check every constraint of the problem, from the plan's own sequences and ranks.

        Raises:
            PlanError: the first constraint that is broken: a sequence left out or run twice, ranks
                that do not exist, are used twice at once or do not number the degree, a degree
                that is not allowed, memory exceeded, or a prediction that is not the cost model's.
        """
        allowed = {line.degree: line.capacity for line in problem.degree_costs}
        seen: dict[int, int] = {}
        for index, batch in enumerate(self.micro_batches):
            used: set[int] = set()
            for group in batch.groups:
                _verify_group(problem, group, allowed, f"micro-batch {index}")
                if used & set(group.ranks):
                    raise PlanError(f"micro-batch {index} runs two groups on {group.ranks}")
                used |= set(group.ranks)
                for sequence in group.sequences:
                    seen[sequence] = seen.get(sequence, 0) + 1
            slowest = max((group.predicted_ms for group in batch.groups), default=0.0)
            if not math.isclose(slowest, batch.makespan_ms, rel_tol=1e-9):
                raise PlanError(f"micro-batch {index} takes {slowest} ms, not {batch.makespan_ms}")
        for sequence in range(len(problem.lengths)):
            if seen.get(sequence, 0) != 1:
                raise PlanError(f"sequence {sequence} is run {seen.get(sequence, 0)} times, not 1")

    def to_json(self) -> dict[str, Any]:
        """The object that `seqpar plan --json` prints; `from_json` reads it back."""
        return {
            "makespan_ms": self.makespan_ms,
            "lower_bound_ms": self.lower_bound_ms,
            "gap": _finite(self.gap),
            "step_lower_bound_ms": self.step_lower_bound_ms,
            "step_gap": _finite(self.step_gap),
            "bound": self.bound,
            "source": self.source,
            "cut_short": self.cut_short,
            "solve_ms": self.solve_ms,
            "bound_ms": self.bound_ms,
            "baselines": dict(self.baselines),
            "micro_batches": [_batch_json(batch) for batch in self.micro_batches],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ScatterPlan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: an entry is missing.
        """
        try:
            return cls(
                micro_batches=tuple(_batch_from_json(row) for row in data["micro_batches"]),
                lower_bound_ms=data["lower_bound_ms"],
                step_lower_bound_ms=data["step_lower_bound_ms"],
                bound=data["bound"],
                baselines=dict(data["baselines"]),
                source=data["source"],
                cut_short=data.get("cut_short", False),
                solve_ms=data.get("solve_ms", 0.0),
                bound_ms=data.get("bound_ms", 0.0),
            )
        except (KeyError, TypeError) as error:
            raise PlanError(f"not a plan: {error} is missing or of the wrong type") from error


def build_plan(
    problem: ScatterProblem,
    batches: Sequence[Sequence[tuple[int, Sequence[int]]]],
    *,
    source: str = "anytime",
) -> ScatterPlan:
    """A plan from (degree, sequence indices) a group; ranks, strategies and ms are worked out.

    Raises:
        PlanError: groups of one micro-batch that cannot be placed on the cluster together.
    """
    built = []
    for groups in batches:
        ordered = sorted(
            ((d, tuple(sorted(members))) for d, members in groups if members),
            key=lambda group: (-group[0], group[1]),
        )
        places = place_groups([degree for degree, _ in ordered], problem.cluster)
        if places is None:
            raise PlanError(f"degrees {[d for d, _ in ordered]} do not fit {problem.cluster}")
        made = tuple(
            _build_group(problem, ranks, members)
            for (_, members), ranks in zip(ordered, places, strict=True)
        )
        built.append(MicroBatch(max(group.predicted_ms for group in made), made))
    built.sort(key=lambda batch: (-batch.makespan_ms, batch.groups[0].sequences))
    return ScatterPlan(micro_batches=tuple(built), source=source)


def to_plan(
    problem: ScatterProblem,
    batch: SortedBatch,
    packings: Sequence[Sequence[tuple[int, Sequence[int]]]],
    *,
    source: str = "anytime",
) -> ScatterPlan:
    """A plan from packings of the problem's sorted batch: (degree line, members) a group."""
    lines, order = batch.degree_lines, batch.order
    groups = [
        [(lines[d].degree, [order[k] for k in members]) for d, members in packing if members]
        for packing in packings
    ]
    return build_plan(problem, groups, source=source)


def place_groups(degrees: Sequence[int], cluster: Cluster) -> list[tuple[int, ...]] | None:
    """Contiguous ranks for each degree (descending), no group across nodes without need.

    Groups larger than a node take whole nodes from rank 0 on; the others go to the first node
    with room, at the first free multiple of their degree if there is one. None if they do not fit.
    """
    per_node = cluster.devices_per_node
    start, places = 0, []
    free: list[tuple[int, int]] | None = None
    node, last = 0, 0
    for degree in degrees:
        if degree > per_node:
            if start + degree > cluster.devices:
                return None
            places.append(tuple(range(start, start + degree)))
            start += degree
            continue
        if free is None:
            stops = range(start, cluster.devices, per_node)
            free = [(a, min(a + per_node, cluster.devices)) for a in stops]
        if degree != last:  # what was too small for the last degree may hold this one
            node, last = 0, degree
        while node < len(free) and free[node][1] - free[node][0] < degree:
            node += 1
        if node == len(free):
            return None
        first, stop = free[node]
        places.append(tuple(range(first, first + degree)))
        free[node] = (first + degree, stop)
    return places


def with_bounds(
    plan: ScatterPlan, *, bounds: Sequence[float], step_bound: float, kind: str, bound_ms: float
) -> ScatterPlan:
    """The plan with a lower bound for each micro-batch and one for the step."""
    batches = tuple(
        replace(batch, lower_bound_ms=min(bound, batch.makespan_ms))
        for batch, bound in zip(plan.micro_batches, bounds, strict=True)
    )
    step = min(step_bound, plan.makespan_ms)
    total = max(step, math.fsum(batch.lower_bound_ms for batch in batches))
    return replace(
        plan,
        micro_batches=batches,
        lower_bound_ms=total,
        step_lower_bound_ms=step,
        bound=kind,
        bound_ms=bound_ms,
    )


def _build_group(problem: ScatterProblem, ranks: tuple[int, ...], members: Sequence[int]) -> Group:
    strategy, ms = problem.strategy_of(members, len(ranks))
    tokens = sum(problem.lengths[index] for index in members)
    return Group(ranks, len(ranks), strategy, tuple(members), ms, tokens)


def _verify_group(
    problem: ScatterProblem, group: Group, allowed: Mapping[int, int], where: str
) -> None:
    if len(set(group.ranks)) != group.degree or group.degree not in allowed:
        raise PlanError(f"{where}: ranks {group.ranks} are not a group of degree {group.degree}")
    if min(group.ranks) < 0 or max(group.ranks) >= problem.cluster.devices:
        raise PlanError(f"{where}: ranks {group.ranks} exceed {problem.cluster.devices} devices")
    if not group.sequences:
        raise PlanError(f"{where}: the group on {group.ranks} has no sequence")
    if min(group.sequences) < 0 or max(group.sequences) >= len(problem.lengths):
        raise PlanError(f"{where}: sequences {group.sequences} exceed {len(problem.lengths)}")
    nodes = {rank // problem.cluster.devices_per_node for rank in group.ranks}
    if len(nodes) != problem.cluster.nodes_spanned(group.degree):
        raise PlanError(f"{where}: ranks {group.ranks} span {len(nodes)} nodes, more than needed")
    tokens = sum(problem.lengths[index] for index in group.sequences)
    if tokens != group.tokens or tokens > allowed[group.degree]:
        raise PlanError(
            f"{where}: {group.ranks} hold {tokens} tokens (plan says {group.tokens}), limit "
            f"{allowed[group.degree]}"
        )
    lengths = [problem.lengths[index] for index in group.sequences]
    strategy = None if group.strategy == "local" else group.strategy
    nodes_spanned = problem.cluster.nodes_spanned(group.degree)
    ms = problem.cost.group_ms(lengths, group.degree, nodes=nodes_spanned, strategy=strategy)
    if not math.isclose(ms, group.predicted_ms, rel_tol=1e-9):
        raise PlanError(f"{where}: {group.ranks} take {ms} ms, but the plan says {group}")


def _batch_json(batch: MicroBatch) -> dict[str, Any]:
    groups = [
        {
            "ranks": list(group.ranks),
            "degree": group.degree,
            "strategy": group.strategy,
            "sequences": list(group.sequences),
            "predicted_ms": group.predicted_ms,
            "tokens": group.tokens,
        }
        for group in batch.groups
    ]
    return {
        "makespan_ms": batch.makespan_ms,
        "lower_bound_ms": batch.lower_bound_ms,
        "groups": groups,
    }


def _batch_from_json(row: dict[str, Any]) -> MicroBatch:
    groups = tuple(
        Group(
            tuple(group["ranks"]),
            group["degree"],
            group["strategy"],
            tuple(group["sequences"]),
            group["predicted_ms"],
            group["tokens"],
        )
        for group in row["groups"]
    )
    return MicroBatch(row["makespan_ms"], groups, row.get("lower_bound_ms", 0.0))


def _gap(makespan_ms: float, bound_ms: float) -> float:
    return makespan_ms / bound_ms - 1 if bound_ms > 0 else math.inf


def _finite(gap: float) -> float | None:
    return gap if math.isfinite(gap) else None
