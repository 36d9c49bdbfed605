"""FlexSP's bucketed mixed-integer programme in PuLP (arXiv 2412.01523, equations 5 to 22).

Virtual groups: devices / d copies of every degree d, each chosen or not. Sequences are replaced
by buckets (`buckets`), of which each group takes an integer count; every member costs as much as
its bucket's longest. The programme minimises the end of the slowest chosen group. It checks the
anytime planner, and polishes its plans offline; it is no way to plan a running step.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from seqpar.planners.batch import SortedBatch
from seqpar.planners.buckets import optimal_buckets
from seqpar.planners.improve import improve
from seqpar.planners.milp_solvers import Solver
from seqpar.planners.packing import Packing, makespan
from seqpar.planners.plan import ScatterPlan, to_plan
from seqpar.planners.problem import ScatterProblem
from seqpar.planners.workers import Workers, map_with

if TYPE_CHECKING:
    import pulp

__all__ = ["ExactResult", "polish", "solve_exact"]

BUCKETS = 16


@dataclass(frozen=True, kw_only=True)
class ExactResult:
    """What the programme found for one micro-batch.

    Args:
        packing: (degree line, members of the sorted batch) a group; None if nothing was found.
        sequences: how many the micro-batch has.
        makespan_ms: of that packing with exact lengths; infinite if nothing was found.
        objective_ms: the programme's own objective, lengths rounded up to their buckets.
        bound_ms: the solver's proven bound on the objective; None if it does not tell (HiGHS and
            CBC do). A bound on the exact problem too only if `exact_lengths`.
        exact_lengths: every bucket holds one length, so that nothing was rounded.
        solve_ms: wall-clock, building the model included.
    """

    packing: Packing | None
    sequences: int
    makespan_ms: float
    objective_ms: float
    bound_ms: float | None
    exact_lengths: bool
    solve_ms: float

    @property
    def gap(self) -> float | None:
        """(objective - bound) / bound; None without a bound or an answer."""
        if self.packing is None or not self.bound_ms:
            return None
        return max(0.0, self.objective_ms / self.bound_ms - 1)

    def to_json(self) -> dict[str, Any]:
        """A JSON object, the groups apart; null where nothing was found or is known."""
        found = self.packing is not None
        return {
            "sequences": self.sequences,
            "makespan_ms": self.makespan_ms if found else None,
            "objective_ms": self.objective_ms if found else None,
            "bound_ms": self.bound_ms,
            "gap": self.gap,
            "exact_lengths": self.exact_lengths,
            "solve_ms": self.solve_ms,
        }


def solve_exact(
    batch: SortedBatch,
    members: Sequence[int],
    *,
    solver: str = "HiGHS",
    time_limit_s: float = 10.0,
    buckets: int = BUCKETS,
) -> ExactResult:
    """The programme's groups for one micro-batch.

    Args:
        batch, members: the sorted batch, and which of its sequences form the micro-batch.
        solver: HiGHS, CBC, or any other solver that PuLP knows by name and finds installed.
        time_limit_s: for the solver; building the model comes on top.
        buckets: how many lengths to tell apart; as many as there are lengths makes it exact.

    Raises:
        PlanError: an unknown solver, or one that is not installed.
    """
    start = time.perf_counter()
    backend = Solver(solver, time_limit_s)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        model = _Programme(batch, members, buckets)
    bound_ms = backend.solve(model.problem)
    packing = model.packing()
    elapsed = (time.perf_counter() - start) * 1e3
    found_ms = makespan(batch, packing) if packing else math.inf
    objective = float(model.problem.objective.value()) if packing else math.inf
    return ExactResult(
        packing=packing,
        sequences=len(members),
        makespan_ms=found_ms,
        objective_ms=objective,
        bound_ms=bound_ms,
        exact_lengths=model.exact,
        solve_ms=elapsed,
    )


def polish(
    problem: ScatterProblem,
    plan: ScatterPlan,
    *,
    solver: str = "HiGHS",
    time_limit_s: float = 10.0,
    buckets: int = BUCKETS,
    workers: Workers | None = None,
) -> tuple[ScatterPlan, list[ExactResult]]:
    """The plan with each micro-batch's groups replaced by the programme's where those are better.

    `source` becomes "exact" if any was. Baselines are kept; bounds are to be attached again.
    Beside it what the programme found for each micro-batch, in the given plan's order. Workers
    share the micro-batches.
    """
    start = time.perf_counter()
    batch = SortedBatch.of(problem)
    position = {index: k for k, index in enumerate(batch.order)}
    line_of = {line.degree: d for d, line in enumerate(batch.degree_lines)}
    started: list[Packing] = [
        [
            (line_of[group.degree], [position[index] for index in group.sequences])
            for group in micro_batch.groups
        ]
        for micro_batch in plan.micro_batches
    ]
    tasks = [(batch, packing, solver, time_limit_s, buckets) for packing in started]
    found = map_with(workers, _polish, tasks)
    packings = [packing for packing, _ in found]
    better = packings != started
    polished = to_plan(problem, batch, packings, source="exact" if better else plan.source)
    elapsed = (time.perf_counter() - start) * 1e3
    polished = replace(polished, baselines=plan.baselines, solve_ms=plan.solve_ms + elapsed)
    return polished, [result for _, result in found]


def _polish(task: tuple[SortedBatch, Packing, str, float, int]) -> tuple[Packing, ExactResult]:
    """One micro-batch's packing, or the programme's, evened out, if that is better."""
    batch, current, solver, time_limit_s, buckets = task
    members = sorted(k for _, group in current for k in group)
    found = solve_exact(batch, members, solver=solver, time_limit_s=time_limit_s, buckets=buckets)
    if found.packing is None:
        return current, found
    best = improve(batch, found.packing, max_steps=200)
    better = makespan(batch, best) < makespan(batch, current) * (1 - 1e-12)
    return best if better else current, found


class _Programme:
    """Variables and constraints; names follow the paper's symbols."""

    def __init__(self, batch: SortedBatch, members: Sequence[int], buckets: int) -> None:
        import pulp

        self.batch = batch
        lengths = [batch.tokens[k] for k in members]
        self.buckets = [
            (longest, [members[i] for i in inside])
            for longest, inside in optimal_buckets(lengths, buckets)
        ]
        self.exact = all(
            batch.tokens[k] == longest for longest, inside in self.buckets for k in inside
        )
        lines = batch.degree_lines
        self.groups = [
            d for d, line in enumerate(lines) for _ in range(batch.devices // line.degree)
        ]
        self.problem = pulp.LpProblem("scatter", pulp.LpMinimize)
        self.end = pulp.LpVariable("C", lowBound=0)
        self.chosen = [pulp.LpVariable(f"m_{p}", cat="Binary") for p in range(len(self.groups))]
        self.count = [
            [self._count(q, p) for p in range(len(self.groups))] for q in range(len(self.buckets))
        ]
        self.problem += self.end
        for p, d in enumerate(self.groups):
            self._group(p, d)
        devices = [lines[d].degree * self.chosen[p] for p, d in enumerate(self.groups)]
        self.problem += pulp.lpSum(devices) <= batch.devices, "devices"
        for q, (_, inside) in enumerate(self.buckets):
            held = [count for count in self.count[q] if count is not None]
            self.problem += pulp.lpSum(held) == len(inside), f"all_of_bucket_{q}"

    def _count(self, q: int, p: int) -> pulp.LpVariable | None:
        """How many of bucket q the group takes; None if it cannot hold one."""
        import pulp

        longest, inside = self.buckets[q]
        if longest > self.batch.degree_lines[self.groups[p]].capacity:
            return None
        return pulp.LpVariable(f"A_{q}_{p}", 0, len(inside), cat="Integer")

    def _group(self, p: int, d: int) -> None:
        import pulp

        line = self.batch.degree_lines[d]
        held = [
            (count, longest)
            for row, (longest, _) in zip(self.count, self.buckets, strict=True)
            if (count := row[p]) is not None
        ]
        work = [
            (line.quadratic * longest**2 + line.linear * longest) * count for count, longest in held
        ]
        self.problem += (
            pulp.lpSum(work) + line.fixed * self.chosen[p] <= self.end,
            f"time_{p}",
        )
        tokens = [longest * count for count, longest in held]
        self.problem += (
            pulp.lpSum(tokens) <= line.capacity * self.chosen[p],
            f"memory_{p}",
        )

    def packing(self) -> Packing | None:
        """The groups of the solution; None if the solver found none."""
        waiting = [list(inside) for _, inside in self.buckets]
        packing: Packing = []
        for p, d in enumerate(self.groups):
            taken: list[int] = []
            for q, row in enumerate(self.count):
                variable = row[p]
                if variable is None:
                    continue
                if variable.varValue is None:
                    return None
                amount = round(variable.varValue)
                taken += waiting[q][:amount]
                waiting[q] = waiting[q][amount:]
            if taken:
                packing.append((d, sorted(taken)))
        if any(waiting) or not self._valid(packing):
            return None
        return packing

    def _valid(self, packing: Packing) -> bool:
        lines, tokens = self.batch.degree_lines, self.batch.tokens
        used = sum(lines[d].degree for d, _ in packing)
        fits = all(sum(tokens[k] for k in group) <= lines[d].capacity for d, group in packing)
        return fits and used <= self.batch.devices
