"""The anytime planner: a valid plan at once, a better one until its work is spent.

For each of a few ways to cut the sequences into micro-batches, each micro-batch is packed to the
least target makespan that succeeds, then improved by local search over its groups and by trying
neighbouring degree vectors. The fixed-degree and rule-based baselines are candidates too, so the
plan is never worse than any of them.

Work is counted in steps (one placement of one sequence, or one local-search step, in units of
about a microsecond); the number allowed follows from the time limit and not from the clock, so
the same problem gives the same plan. The clock only stops a machine that is far too slow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from seqpar.errors import PlanError
from seqpar.planners.baselines import baseline_plans
from seqpar.planners.batch import SortedBatch
from seqpar.planners.bounds import bound_plan
from seqpar.planners.improve import improve
from seqpar.planners.microbatch import best_cuts, safe_cuts
from seqpar.planners.packing import Packing, makespan, pack_to_target, spread
from seqpar.planners.plan import ScatterPlan, build_plan
from seqpar.planners.problem import ScatterProblem

__all__ = ["Planner", "solve_batch", "solve_step"]

STEPS_PER_MS = 400
FILLS = (1.0, 0.98, 0.95, 0.9)


@dataclass(frozen=True, kw_only=True)
class Planner:
    """Plans one step after the other; holds nothing between them.

    Args:
        time_limit_ms: how much work a plan may take, in milliseconds of a slow core.
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
        """The best plan found for one step; verified before it is returned."""
        start = time.perf_counter()
        batch = SortedBatch.of(problem)
        allowed = int(self.time_limit_ms * STEPS_PER_MS)
        best = to_plan(problem, batch, solve_step(batch, max_steps=allowed))
        others = baseline_plans(problem) if self.baselines else {}
        for name in sorted(others):
            if others[name].makespan_ms < best.makespan_ms:
                best = replace(others[name], source=name)
        solve_ms = (time.perf_counter() - start) * 1e3
        costs = {name: plan.makespan_ms for name, plan in others.items()}
        best = replace(best, baselines=costs, solve_ms=solve_ms)
        best.verify(problem)
        return best if self.bound == "none" else bound_plan(problem, best, kind=self.bound)


def to_plan(
    problem: ScatterProblem,
    batch: SortedBatch,
    packings: Sequence[Packing],
    *,
    source: str = "anytime",
) -> ScatterPlan:
    """A plan from packings of a sorted batch."""
    groups = [
        [
            (batch.degree_lines[d].degree, [batch.order[k] for k in members])
            for d, members in packing
            if members
        ]
        for packing in packings
    ]
    return build_plan(problem, groups, source=source)


def solve_step(batch: SortedBatch, *, max_steps: int) -> list[Packing]:
    """Packings of every micro-batch of a step, the least sum of makespans found."""
    best = list(safe_cuts(batch))
    best_ms = sum(makespan(batch, packing) for packing in best)
    tried = set()
    for fill in FILLS:
        cuts = best_cuts(batch, fill=fill)
        if cuts is None or tuple(cuts) in tried:
            continue
        tried.add(tuple(cuts))
        pieces = list(pairwise(cuts))
        found = []
        for first, stop in pieces:
            packing = solve_batch(batch, range(first, stop), max_steps=max_steps // len(pieces))
            if packing is None:
                break
            found.append(packing)
        if len(found) == len(pieces):
            total = sum(makespan(batch, packing) for packing in found)
            if total < best_ms:
                best, best_ms = found, total
    return best


def solve_batch(batch: SortedBatch, members: Sequence[int], *, max_steps: int) -> Packing | None:
    """Groups for one micro-batch; None if they were not found to fit it."""
    first = _least_target(batch, members)
    if first is None:
        return None
    best, steps = improve(batch, first, max_steps=60)
    best_ms = makespan(batch, best)
    used = steps * 100
    tried = set()
    improving = True
    while improving and used < max_steps:
        improving = False
        vector = tuple(sorted(d for d, group in best if group))
        for neighbour in _neighbours(batch, vector):
            if neighbour in tried or used >= max_steps:
                continue
            tried.add(neighbour)
            used += 4 * len(members)
            packing = spread(batch, members, neighbour)
            if packing is None or makespan(batch, packing) > best_ms * 1.1:
                continue
            packing, steps = improve(batch, packing, max_steps=60)
            used += steps * 100
            found_ms = makespan(batch, packing)
            if found_ms < best_ms * (1 - 1e-9):
                best, best_ms, improving = packing, found_ms, True
    return best


def _least_target(batch: SortedBatch, members: Sequence[int]) -> Packing | None:
    """The packing of the least target makespan that succeeds, by bisection."""
    lines = batch.degree_lines
    weights = batch.weights
    lower = max(
        min(lines[d].fixed + weights[d][k] for d in range(batch.smallest[k], len(lines)))
        for k in members
    )
    high, best, best_ms = lower, None, float("inf")
    for _ in range(24):
        packing, ms = _packed(batch, members, high)
        if packing is not None:
            best, best_ms = packing, ms
            break
        lower, high = high, high * 1.25
    if best is None:
        return None
    for _ in range(9):
        if best_ms <= lower * 1.001:
            break
        middle = (lower + best_ms) / 2
        packing, ms = _packed(batch, members, middle)
        if packing is None:
            lower = middle
        elif ms < best_ms:
            best, best_ms = packing, ms
    return best


def _packed(
    batch: SortedBatch, members: Sequence[int], target_ms: float
) -> tuple[Packing | None, float]:
    found: Packing | None = None
    found_ms = float("inf")
    for fill_first in (False, True):
        packing = pack_to_target(batch, members, target_ms, fill_first=fill_first)
        if packing is not None and makespan(batch, packing) < found_ms:
            found, found_ms = packing, makespan(batch, packing)
    return found, found_ms


def _neighbours(batch: SortedBatch, vector: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Degree vectors one split, merge or growth away, and with idle devices put to use."""
    lines = batch.degree_lines
    left = batch.devices - sum(lines[d].degree for d in vector)
    found = []
    for i, d in enumerate(vector):
        if i and vector[i - 1] == d:
            continue
        rest = vector[:i] + vector[i + 1 :]
        for e in range(d):
            pieces = lines[d].degree // lines[e].degree
            found.append(tuple(sorted(rest + (e,) * pieces)))
        for e in range(d + 1, len(lines)):
            wanted = lines[e].degree - lines[d].degree - left
            merged = list(rest)
            while wanted > 0 and merged:
                wanted -= lines[merged.pop(0)].degree
            if wanted <= 0:
                room = -wanted
                grown = tuple(sorted([*merged, e, *_fill(batch, room)]))
                found.append(grown)
    for extra in _fill(batch, left)[:1]:
        found.append(tuple(sorted((*vector, extra))))
    if left:
        found.append(tuple(sorted((*vector, *_fill(batch, left)))))
    return found


def _fill(batch: SortedBatch, devices: int) -> list[int]:
    """Degree lines, largest first, that use up to that many devices."""
    found = []
    for d in range(len(batch.degree_lines) - 1, -1, -1):
        degree = batch.degree_lines[d].degree
        while degree <= devices:
            found.append(d)
            devices -= degree
    return found
