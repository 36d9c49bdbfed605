"""The anytime planner: a valid plan at once, a better one until its work is spent.

Micro-batches and groups are chosen together by a search over cascades (`cascade`); each
micro-batch's groups are then evened out by local search (`improve`). The fixed-degree and
rule-based baselines are candidates too, so the plan is never worse than any of them.

Work is counted in placements of one sequence; how many are allowed follows from the time limit
and not from the clock, so the same problem gives the same plan on a fast and on a slow machine.
The clock ends the search only where it takes ten times the limit.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from seqpar.errors import PlanError
from seqpar.planners.baselines import baseline_packings, step_ms
from seqpar.planners.batch import SortedBatch
from seqpar.planners.bounds import bound_plan
from seqpar.planners.cascade import CascadeSearch
from seqpar.planners.degrees import search_degrees
from seqpar.planners.improve import improve
from seqpar.planners.microbatch import likely_counts, safe_packings
from seqpar.planners.packing import Packing
from seqpar.planners.plan import ScatterPlan, to_plan
from seqpar.planners.problem import ScatterProblem

__all__ = ["Planner"]

PLACEMENTS_PER_MS = 200
"""Search work that a millisecond of the limit buys; the rest of it goes to everything else."""

VECTOR_PLACEMENTS_PER_MS = 4

POLISH_STEPS = 40

PIECE_MICRO_BATCHES = 12

SAFETY = 10.0
"""The clock ends a search only after this many times its limit (and at least a second)."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans one step after the other; holds nothing between them.

    Args:
        time_limit_ms: how much work a plan may take, in milliseconds of a usual core. It buys a
            counted amount of work, so the same limit gives the same plan on fast and slow machines.
        bound: the lower bound to attach: "none", "degree" (milliseconds) or "configuration"
            (column generation, seconds).
        baselines: compare with the fixed-degree and rule-based plans, and never be worse.

    Raises:
        PlanError: a time limit that is not over 0, or an unknown bound.
    """

    time_limit_ms: float = 200.0
    bound: str = "degree"
    baselines: bool = True

    def __post_init__(self) -> None:
        if not self.time_limit_ms > 0:
            raise PlanError(f"time_limit_ms must be over 0, got {self.time_limit_ms}")
        if self.bound not in ("none", "degree", "configuration"):
            raise PlanError(f"bound is none, degree or configuration, got {self.bound!r}")

    def plan(self, problem: ScatterProblem) -> ScatterPlan:
        """The best plan found for one step, verified, with its bounds and baselines."""
        start = time.perf_counter()
        batch = SortedBatch.of(problem)
        *_, packings = self._search_whole(batch)
        plan = to_plan(problem, batch, packings)
        if self.baselines:
            plan = _with_baselines(problem, batch, plan)
        plan.verify(problem)
        plan = replace(plan, solve_ms=(time.perf_counter() - start) * 1e3)
        return plan if self.bound == "none" else bound_plan(problem, plan, kind=self.bound)

    def plans(self, problem: ScatterProblem) -> Iterator[ScatterPlan]:
        """Each better plan as it is found, the first at once, without bounds and baselines."""
        start = time.perf_counter()
        batch = SortedBatch.of(problem)
        for packings in self._search_whole(batch):
            plan = to_plan(problem, batch, packings)
            plan.verify(problem)
            yield replace(plan, solve_ms=(time.perf_counter() - start) * 1e3)

    def _search_whole(self, batch: SortedBatch) -> Iterator[list[Packing]]:
        """The search, in pieces if the step has very many micro-batches.

        Every P-th sequence makes a piece, so that each has the lengths of the whole batch.
        """
        capacity = batch.devices * batch.device_token_capacity
        pieces = round(sum(batch.tokens) / capacity / PIECE_MICRO_BATCHES)
        if pieces < 2:
            yield from self._search(batch)
            return
        part = replace(self, time_limit_ms=self.time_limit_ms / pieces)
        whole: list[Packing] = []
        for first in range(pieces):
            members = range(first, len(batch.tokens), pieces)
            *_, packings = part._search(batch.subset(members))
            whole += [[(d, [members[k] for k in ks]) for d, ks in packing] for packing in packings]
        yield whole

    def _search(self, batch: SortedBatch) -> Iterator[list[Packing]]:
        best_ms, best = float("inf"), list[Packing]()
        search = CascadeSearch(
            batch,
            max_steps=int(self.time_limit_ms * PLACEMENTS_PER_MS),
            deadline_s=time.perf_counter() + SAFETY * max(self.time_limit_ms, 100.0) / 1e3,
        )
        for ms, packings in search.run(likely_counts(batch)):
            if ms < best_ms:
                best_ms, best = ms, packings
                yield best
        if not best:
            best = safe_packings(batch)
            best_ms = step_ms(batch, best)
            yield best
        polished = [self._polish(batch, packing) for packing in best]
        if step_ms(batch, polished) < best_ms:
            yield polished

    def _polish(self, batch: SortedBatch, packing: Packing) -> Packing:
        """The micro-batch with its groups evened out, and other degrees tried if it is small."""
        members = sorted(k for _, group in packing for k in group)
        vectors = int(self.time_limit_ms * VECTOR_PLACEMENTS_PER_MS / len(members))
        even = improve(batch, packing, max_steps=POLISH_STEPS)
        return search_degrees(batch, members, even, max_vectors=vectors) or even


def _with_baselines(problem: ScatterProblem, batch: SortedBatch, plan: ScatterPlan) -> ScatterPlan:
    """The plan, or the baseline that is better, evened out; with what each baseline costs."""
    found = baseline_packings(batch, context_tokens=problem.context_tokens or 0)
    plans = {}
    for name, (ms, packings) in found.items():
        if ms < plan.makespan_ms:
            even = [improve(batch, packing, max_steps=4) for packing in packings]
            plans[name] = to_plan(problem, batch, even, source=name)
    best = min([plan, *plans.values()], key=lambda candidate: candidate.makespan_ms)
    return replace(best, baselines={name: ms for name, (ms, _) in found.items()})
