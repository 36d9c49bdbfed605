"""Plan from a length histogram, before any data is read: what to expect of a cluster.

Batches are sampled from the histogram and planned; means come with a 95% interval of the mean
over batches (Student's t), so that "how many batches" is answered by "how sure".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from seqpar.errors import PlanError
from seqpar.planners.anytime import Planner
from seqpar.planners.cost import CostModel
from seqpar.planners.histogram import LengthHistogram
from seqpar.planners.plan import ScatterPlan
from seqpar.planners.problem import Cluster, ScatterProblem
from seqpar.planners.workers import Workers, map_with

__all__ = ["Estimate", "Forecast", "forecast", "longest_document", "summarise"]


@dataclass(frozen=True)
class Estimate:
    """A mean over sampled batches, and how far off it may be (95%)."""

    mean: float
    plus_minus: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """Mean and 95% half-width by Student's t; infinite for one value."""
        mean = math.fsum(values) / len(values)
        if len(values) < 2:
            return cls(mean, math.inf)
        variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
        return cls(mean, _student_t(len(values) - 1) * math.sqrt(variance / len(values)))


@dataclass(frozen=True)
class Forecast:
    """What a cluster will do with such lengths.

    Args:
        step_ms, tokens_per_second, micro_batches: means over the sampled batches.
        degree_share: share of the busy device time spent at each degree.
        memory_headroom: share of token memory that stays free on the fullest device of a batch.
        idle_share: share of device time without work: unbalanced groups and unused devices.
        speedup: over each baseline, by name.
        longest_tokens: the longest document that fits this cluster at all.
        batches: how many were sampled, of how many sequences.
        left_out_share: share of the histogram's documents that are too long and so left out.
    """

    step_ms: Estimate
    tokens_per_second: Estimate
    micro_batches: Estimate
    degree_share: Mapping[int, float]
    memory_headroom: Estimate
    idle_share: Estimate
    speedup: Mapping[str, Estimate]
    longest_tokens: int
    batches: int
    sequences: int
    left_out_share: float = 0.0
    plans: tuple[ScatterPlan, ...] = field(default=(), compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        """A JSON object; an infinite interval (one batch) is null."""

        def pair(estimate: Estimate) -> dict[str, float | None]:
            width = estimate.plus_minus
            return {"mean": estimate.mean, "plus_minus": width if math.isfinite(width) else None}

        return {
            "step_ms": pair(self.step_ms),
            "tokens_per_second": pair(self.tokens_per_second),
            "micro_batches": pair(self.micro_batches),
            "degree_share": {str(degree): share for degree, share in self.degree_share.items()},
            "memory_headroom": pair(self.memory_headroom),
            "idle_share": pair(self.idle_share),
            "speedup": {name: pair(estimate) for name, estimate in self.speedup.items()},
            "longest_tokens": self.longest_tokens,
            "batches": self.batches,
            "sequences": self.sequences,
            "left_out_share": self.left_out_share,
        }


def longest_document(cluster: Cluster, cost: CostModel) -> int:
    """Tokens of the longest document that some group of the cluster holds."""
    return max(line.capacity for line in ScatterProblem((1,), cluster, cost).degree_costs)


def forecast(
    histogram: LengthHistogram,
    cluster: Cluster,
    cost: CostModel,
    *,
    sequences: int = 512,
    batches: int = 8,
    context_tokens: int | None = None,
    seed: int = 0,
    planner: Planner | None = None,
    workers: Workers | None = None,
) -> Forecast:
    """Sample batches from the histogram, plan each, and say what to expect.

    Documents longer than `context_tokens` (default: the longest that fits) are dropped, as a
    data loader would. Workers share the batches.

    Raises:
        PlanError: no batches, or a histogram without documents that fit.
        InfeasiblePlanError: the cluster cannot hold even one token a device.
    """
    if batches < 1 or sequences < 1:
        raise PlanError(f"a forecast needs batches and sequences, got {batches=}, {sequences=}")
    planner = planner or Planner(time_limit_ms=100, bound="none")
    longest = longest_document(cluster, cost)
    limit = min(longest, context_tokens or longest)
    problems = [
        ScatterProblem(
            tuple(histogram.sample(sequences, seed=seed * 1_000_003 + i, max_tokens=limit)),
            cluster,
            cost,
            context_tokens,
        )
        for i in range(batches)
    ]
    plans = map_with(workers, planner.plan, problems)
    found = summarise(list(zip(problems, plans, strict=True)), longest_tokens=longest)
    return replace(found, left_out_share=histogram.share_over(limit))


def summarise(
    found: Sequence[tuple[ScatterProblem, ScatterPlan]], *, longest_tokens: int
) -> Forecast:
    """The forecast that planned batches amount to."""
    plans = [plan for _, plan in found]
    tokens = [sum(problem.lengths) for problem, _ in found]
    names = set.intersection(*(set(plan.baselines) for plan in plans))
    busy: dict[int, float] = {}
    for degree, ms in (piece for plan in plans for piece in _device_ms(plan)):
        busy[degree] = busy.get(degree, 0.0) + ms
    total = math.fsum(busy.values())
    return Forecast(
        step_ms=Estimate.of([plan.makespan_ms for plan in plans]),
        tokens_per_second=Estimate.of(
            [n / plan.makespan_ms * 1e3 for n, plan in zip(tokens, plans, strict=True)]
        ),
        micro_batches=Estimate.of([float(len(plan.micro_batches)) for plan in plans]),
        degree_share={degree: busy[degree] / total for degree in sorted(busy)},
        memory_headroom=Estimate.of([_headroom(problem, plan) for problem, plan in found]),
        idle_share=Estimate.of([_idle(problem, plan) for problem, plan in found]),
        speedup={
            name: Estimate.of([plan.baselines[name] / plan.makespan_ms for plan in plans])
            for name in sorted(names)
        },
        longest_tokens=longest_tokens,
        batches=len(found),
        sequences=len(found[0][0].lengths),
        plans=tuple(plans),
    )


def _device_ms(plan: ScatterPlan) -> Iterator[tuple[int, float]]:
    for batch in plan.micro_batches:
        for group in batch.groups:
            yield group.degree, group.degree * group.predicted_ms


def _headroom(problem: ScatterProblem, plan: ScatterPlan) -> float:
    fullest = max(
        group.tokens / group.degree for batch in plan.micro_batches for group in batch.groups
    )
    return 1 - fullest / problem.tokens_per_device


def _idle(problem: ScatterProblem, plan: ScatterPlan) -> float:
    busy = math.fsum(ms for _, ms in _device_ms(plan))
    return 1 - busy / (plan.makespan_ms * problem.cluster.devices)


def _student_t(freedom: int) -> float:
    """The 97.5% point of Student's t (Cornish-Fisher; exact for 1 and 2, else within 1%)."""
    z = 1.959964
    if freedom == 1:
        return 12.7062
    if freedom == 2:
        return 4.3027
    n = float(freedom)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / n + g2 / n**2 + g3 / n**3
