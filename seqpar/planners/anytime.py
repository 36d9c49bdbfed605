"""The anytime planner: a valid plan at once, a better one until its work is spent.

Micro-batches and groups are chosen together by a search over cascades (`cascade`); each
micro-batch's groups are then polished by local search (`polish`). The fixed-degree and rule-based
baselines are candidates too, so the plan is never worse than any of them.

Work is counted, in placements of one sequence; how much is allowed follows from the time limit,
and takes half of it to four fifths on a usual core. So the same problem gives the same plan, as
long as the machine keeps up. Where it does not, the clock ends the search at the limit, and the
plan says so (`cut_short`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from math import inf

from seqpar.errors import PlanError
from seqpar.planners.baselines import baseline_packings, megatron_packings, step_ms
from seqpar.planners.batch import SortedBatch
from seqpar.planners.cascade import CascadeSearch
from seqpar.planners.certificate import bound_plan
from seqpar.planners.clock import Clock
from seqpar.planners.microbatch import likely_counts, safe_packings
from seqpar.planners.packing import Packing
from seqpar.planners.plan import ScatterPlan, to_plan
from seqpar.planners.polish import polish_packings
from seqpar.planners.problem import ScatterProblem
from seqpar.planners.workers import Workers, map_with

__all__ = ["Planner"]

PLACEMENTS_PER_MS = 200
"""Search work that a millisecond of the limit buys; the rest of it goes to everything else."""

PIECE_MICRO_BATCHES = 12

PIECES_SHARE = 0.6
"""Of the limit, for cascades in pieces: they come after a rule's plan and its polish."""

PROMISING = 1.01
"""Candidates within this factor of the best plan are worth polishing."""

FINISH_MS_PER_SEQUENCE = 0.008
"""What making and verifying the plan takes, kept back from the search's time."""

Candidate = tuple[float, list[Packing], str]
"""ms of the step, its micro-batches, and what found them."""


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans one step after the other; holds nothing between them but its workers.

    Args:
        time_limit_ms: what planning may take, bounds apart. The first plan and the baselines are
            finished whatever the limit.
        bound: the lower bound to attach: "none", "degree" (milliseconds) or "configuration"
            (column generation, seconds).
        baselines: compare with the fixed-degree and rule-based plans, and never be worse.
        repeatable: ignore the clock and do all the counted work: the same plan on any machine,
            later on a slow or busy one.
        workers: processes to share micro-batches with, where a step is large; it changes no plan.

    Raises:
        PlanError: a time limit that is not over 0 or without end, or an unknown bound.
    """

    time_limit_ms: float = 200.0
    bound: str = "degree"
    baselines: bool = True
    repeatable: bool = False
    workers: Workers | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.time_limit_ms < inf:
            raise PlanError(f"time_limit_ms must be over 0 and finite, got {self.time_limit_ms}")
        if self.bound not in ("none", "degree", "configuration"):
            raise PlanError(f"bound is none, degree or configuration, got {self.bound!r}")

    def plan(self, problem: ScatterProblem) -> ScatterPlan:
        """The best plan found for one step, verified, with its bounds and baselines."""
        start = time.perf_counter()
        clock = self._clock(problem)
        batch = SortedBatch.of(problem)
        context = problem.context_tokens or 0
        found = baseline_packings(batch, context_tokens=context) if self.baselines else {}
        rivals = [(ms, packings, name) for name, (ms, packings) in found.items()]
        *_, (_, packings, source) = self._search(batch, clock, rivals)
        plan = to_plan(problem, batch, packings, source=source)
        plan.verify(problem)
        plan = replace(
            plan,
            baselines={name: ms for name, (ms, _) in found.items()},
            cut_short=clock.has_struck,
            solve_ms=(time.perf_counter() - start) * 1e3,
        )
        if self.bound == "none":
            return plan
        return bound_plan(problem, plan, kind=self.bound, workers=self.workers)

    def plans(self, problem: ScatterProblem) -> Iterator[ScatterPlan]:
        """Each better plan as it is found, the first at once, without bounds and baselines."""
        start = time.perf_counter()
        clock = self._clock(problem)
        batch = SortedBatch.of(problem)
        for _, packings, source in self._search(batch, clock, []):
            plan = to_plan(problem, batch, packings, source=source)
            plan.verify(problem)
            yield replace(plan, solve_ms=(time.perf_counter() - start) * 1e3)

    def _clock(self, problem: ScatterProblem) -> Clock:
        if self.repeatable:
            return Clock()
        return Clock(self.time_limit_ms).earlier(FINISH_MS_PER_SEQUENCE * len(problem.lengths))

    def _search(
        self, batch: SortedBatch, clock: Clock, rivals: list[Candidate]
    ) -> Iterator[Candidate]:
        """Better and better steps: the best of each family of candidates is polished."""
        best: Candidate = (inf, [], "anytime")
        for family in self._families(batch, clock, rivals):
            start: Candidate = (inf, [], "")
            for candidate in family:
                start = min(start, candidate, key=_ms)
                if candidate[0] < best[0]:
                    best = candidate
                    yield best
            if clock.is_over() or start[0] > PROMISING * best[0]:
                continue
            polished = polish_packings(
                batch, start[1], time_limit_ms=self.time_limit_ms, clock=clock, workers=self.workers
            )
            candidate = step_ms(batch, polished), polished, start[2]
            if candidate[0] < best[0]:
                best = candidate
                yield best

    def _families(
        self, batch: SortedBatch, clock: Clock, rivals: list[Candidate]
    ) -> Iterator[Iterable[Candidate]]:
        """Cascades and rivals together; where micro-batches are many, a rule before cascades."""
        pieces = round(batch.least_micro_batches / PIECE_MICRO_BATCHES)
        if pieces < 2:
            yield chain(self._cascades(batch, clock), rivals)
            return
        yield rivals or [self._rule(batch)]
        yield self._in_pieces(batch, pieces, clock)

    def _rule(self, batch: SortedBatch) -> Candidate:
        packings = megatron_packings(batch) or safe_packings(batch)
        return step_ms(batch, packings), packings, "megatron_dynamic"

    def _in_pieces(self, batch: SortedBatch, pieces: int, clock: Clock) -> Iterator[Candidate]:
        """Every P-th sequence makes a piece, so that each has the lengths of the whole batch.

        Nothing if the clock strikes before every piece has its micro-batches.
        """
        share = replace(
            self, time_limit_ms=PIECES_SHARE * self.time_limit_ms / pieces, workers=None
        )
        tasks = [
            (share, batch.subset(range(first, len(batch.tokens), pieces)), clock)
            for first in range(pieces)
        ]
        whole: list[Packing] = []
        for first, (packings, was_cut) in enumerate(map_with(self.workers, _piece, tasks)):
            clock.has_struck |= was_cut
            if not packings:
                return
            members = range(first, len(batch.tokens), pieces)
            whole += [[(d, [members[k] for k in ks]) for d, ks in packing] for packing in packings]
        yield step_ms(batch, whole), whole, "anytime"

    def _cascades(self, batch: SortedBatch, clock: Clock) -> Iterator[Candidate]:
        max_steps = int(self.time_limit_ms * PLACEMENTS_PER_MS)
        search = CascadeSearch(batch, max_steps=max_steps, clock=clock)
        found = False
        for ms, packings in search.run(likely_counts(batch)):
            found = True
            yield ms, packings, "anytime"
        if not found:
            safe = safe_packings(batch)
            yield step_ms(batch, safe), safe, "anytime"


def _piece(task: tuple[Planner, SortedBatch, Clock]) -> tuple[list[Packing], bool]:
    """The best cascade of one piece of a step, and whether the clock ended its search.

    No packings if it was over before.
    """
    planner, batch, clock = task
    if clock.is_over():
        return [], True
    *_, (_, packings, _) = planner._cascades(batch, clock)
    return packings, clock.has_struck


def _ms(candidate: Candidate) -> float:
    return candidate[0]
