"""Other ways to plan a step: what a plan is compared with, and what it falls back to.

- fixed degree: one degree for every group of every step (DeepSpeed-Ulysses style), the one that
  is best over all steps given and holds their longest context;
- best degree per batch (FlexSP's BatchAda): the best single degree for this step alone;
- Megatron's dynamic rule: each sequence at the smallest degree that holds it, groups balanced by
  squared length alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from seqpar.errors import PlanError
from seqpar.planners.batch import SortedBatch
from seqpar.planners.packing import Packing, spread
from seqpar.planners.plan import ScatterPlan, build_plan
from seqpar.planners.problem import ScatterProblem

__all__ = [
    "baseline_plans",
    "best_degree_per_batch",
    "best_fixed_degree",
    "fixed_degree",
    "megatron_dynamic",
]


def baseline_plans(problem: ScatterProblem) -> dict[str, ScatterPlan]:
    """Every baseline's plan for the step, by name."""
    by_degree = _by_degree(problem)
    found = {}
    if by_degree:
        holding = {d: plan for d, plan in by_degree.items() if _holds_context(problem, d)}
        batch = min(by_degree.values(), key=lambda plan: plan.makespan_ms)
        found["best_degree_per_batch"] = batch
        if holding:
            found["fixed_degree"] = min(holding.values(), key=lambda plan: plan.makespan_ms)
    rule = megatron_dynamic(problem)
    if rule is not None:
        found["megatron_dynamic"] = rule
    return found


def best_fixed_degree(problems: ScatterProblem | Sequence[ScatterProblem]) -> list[ScatterPlan]:
    """The one degree that is best in total over all the steps, as a plan for each step.

    Degrees that cannot hold the longest document, or a problem's `context_tokens`, are out.

    Raises:
        PlanError: no problems, or no single degree holds every sequence.
    """
    steps = [problems] if isinstance(problems, ScatterProblem) else list(problems)
    if not steps:
        raise PlanError("best_fixed_degree needs at least one problem")
    by_step = [_by_degree(problem) for problem in steps]
    totals = {
        degree: math.fsum(plans[degree].makespan_ms for plans in by_step)
        for degree in sorted(by_step[0])
        if all(degree in plans for plans in by_step)
        and all(_holds_context(problem, degree) for problem in steps)
    }
    if not totals:
        raise PlanError("no single degree holds every sequence of these steps")
    best = min(totals, key=lambda degree: (totals[degree], degree))
    return [plans[best] for plans in by_step]


def best_degree_per_batch(problem: ScatterProblem) -> ScatterPlan:
    """The best single degree for this step alone.

    Raises:
        PlanError: no single degree holds every sequence.
    """
    by_degree = _by_degree(problem)
    if not by_degree:
        raise PlanError("no single degree holds every sequence of this step")
    return min(by_degree.values(), key=lambda plan: plan.makespan_ms)


def fixed_degree(problem: ScatterProblem, degree: int) -> ScatterPlan | None:
    """The step with every group of this degree; None if a sequence does not fit such a group.

    Sequences are sorted and cut into micro-batches, spread over the groups longest first; the
    number of micro-batches is the best of the smallest few that hold the tokens.
    """
    batch = SortedBatch.of(problem)
    line = next(i for i, line in enumerate(batch.degree_lines) if line.degree == degree)
    if batch.tokens[0] > batch.degree_lines[line].capacity:
        return None
    groups = batch.devices // degree
    capacity = groups * batch.degree_lines[line].capacity
    smallest = -(-sum(batch.tokens) // capacity)
    best: tuple[float, list[Packing]] | None = None
    for count in _counts(smallest):
        found = _cut_evenly(batch, line, groups, capacity, count)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
    if best is None:
        best = _first_fit(batch, line, groups)
    return _plan(problem, batch, best[1], f"fixed_degree_{degree}")


def megatron_dynamic(problem: ScatterProblem) -> ScatterPlan | None:
    """Megatron-LM's dynamic context-parallel rule, modelled; None if it leaves a sequence over.

    After `BalancedCPScheduler` (megatron/core/pipeline_parallel/hybrid_cp_schedule.py): from the
    longest down, each sequence goes to the group that has the least Σs²/degree among those of
    its smallest sufficient degree with room, or opens such a group while devices remain; when
    neither is left the micro-batch closes. Its cost knows neither linear nor exchange terms; the
    plan's time here is that of the full cost model.
    """
    batch = SortedBatch.of(problem)
    packings: list[Packing] = []
    waiting = list(range(len(batch.tokens)))
    while waiting:
        packing, waiting = _megatron_batch(batch, waiting)
        if not packing:
            return None
        packings.append(packing)
    return _plan(problem, batch, packings, "megatron_dynamic")


def _megatron_batch(batch: SortedBatch, waiting: list[int]) -> tuple[Packing, list[int]]:
    packing: Packing = []
    work: list[float] = []
    room: list[int] = []
    left = batch.devices
    later = []
    for k in waiting:
        d = batch.smallest[k]
        line = batch.degree_lines[d]
        if line.degree <= left:
            packing.append((d, [k]))
            work.append(batch.tokens[k] ** 2 / line.degree)
            room.append(line.capacity - batch.tokens[k])
            left -= line.degree
            continue
        fits = [g for g in range(len(packing)) if packing[g][0] >= d and room[g] >= batch.tokens[k]]
        if not fits:
            later.append(k)
            continue
        g = min(fits, key=lambda g: (work[g], g))
        packing[g][1].append(k)
        work[g] += batch.tokens[k] ** 2 / batch.degree_lines[packing[g][0]].degree
        room[g] -= batch.tokens[k]
    return packing, later


def _by_degree(problem: ScatterProblem) -> dict[int, ScatterPlan]:
    plans = {line.degree: fixed_degree(problem, line.degree) for line in problem.degree_costs}
    return {degree: plan for degree, plan in plans.items() if plan is not None}


def _holds_context(problem: ScatterProblem, degree: int) -> bool:
    capacity = next(line.capacity for line in problem.degree_costs if line.degree == degree)
    return capacity >= (problem.context_tokens or 0)


def _counts(smallest: int) -> range:
    return range(smallest, smallest + 4)


def _cut_evenly(
    batch: SortedBatch, line: int, groups: int, capacity: int, count: int
) -> tuple[float, list[Packing]] | None:
    """Contiguous pieces of about equal device time, each spread over its groups."""
    weights = batch.weights[line]
    share = sum(weights) / count
    packings: list[Packing] = []
    total, first, done = 0.0, 0, 0.0
    tokens = 0
    for k, ms in enumerate(weights):
        full = done + ms / 2 >= share * (len(packings) + 1) and len(packings) < count - 1
        if k > first and (full or tokens + batch.tokens[k] > capacity):
            piece = _spread_piece(batch, line, groups, first, k)
            if piece is None:
                return None
            packings.append(piece[1])
            total += piece[0]
            first, tokens = k, 0
        done += ms
        tokens += batch.tokens[k]
    piece = _spread_piece(batch, line, groups, first, len(weights))
    if piece is None:
        return None
    return total + piece[0], [*packings, piece[1]]


def _spread_piece(
    batch: SortedBatch, line: int, groups: int, first: int, stop: int
) -> tuple[float, Packing] | None:
    packing = spread(batch, range(first, stop), [line] * groups)
    if packing is None:
        return None
    slowest = max(sum(batch.weights[line][k] for k in members) for _, members in packing)
    return slowest + batch.degree_lines[line].fixed, packing


def _first_fit(batch: SortedBatch, line: int, groups: int) -> tuple[float, list[Packing]]:
    """One group after the other, filled in order: always fits."""
    filled: list[list[int]] = []
    room = 0
    for k, tokens in enumerate(batch.tokens):
        if not filled or tokens > room:
            filled.append([])
            room = batch.degree_lines[line].capacity
        filled[-1].append(k)
        room -= tokens
    pieces = [filled[i : i + groups] for i in range(0, len(filled), groups)]
    return 0.0, [[(line, members) for members in piece] for piece in pieces]


def _plan(
    problem: ScatterProblem, batch: SortedBatch, packings: Sequence[Packing], source: str
) -> ScatterPlan:
    groups = [
        [
            (batch.degree_lines[d].degree, [batch.order[k] for k in members])
            for d, members in packing
            if members
        ]
        for packing in packings
    ]
    return build_plan(problem, groups, source=source)
