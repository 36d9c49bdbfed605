"""Other ways to plan a step: what a plan is compared with, and what it falls back to.

- `fixed_degree`: one degree for every group of every step (DeepSpeed-Ulysses style), the one that
  is best over all steps given and holds their longest context;
- `best_degree_per_batch`: the best single degree for this step alone (FlexSP's BatchAda);
- `megatron_dynamic`: each sequence at the smallest degree that holds it, groups balanced by
  squared length alone.

Each is planned exactly and at its best: several numbers of micro-batches are tried, sequences are
balanced longest first with the full cost model (the rule apart, which has its own).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from seqpar.errors import PlanError
from seqpar.planners.batch import SortedBatch
from seqpar.planners.packing import Packing, makespan, spread
from seqpar.planners.plan import ScatterPlan, to_plan
from seqpar.planners.problem import ScatterProblem

__all__ = [
    "LABELS",
    "baseline_packings",
    "best_degree_per_batch",
    "best_fixed_degree",
    "fixed_degree",
    "megatron_dynamic",
    "megatron_packings",
    "step_ms",
]

EXTRA_MICRO_BATCHES = 4

LABELS = {
    "fixed_degree": "fixed degree",
    "best_degree_per_batch": "best degree per batch",
    "megatron_dynamic": "Megatron's dynamic rule",
}
"""What people call the baselines."""


def step_ms(batch: SortedBatch, packings: Sequence[Packing]) -> float:
    """ms of micro-batches run one after the other."""
    return math.fsum(makespan(batch, packing) for packing in packings)


def baseline_packings(
    batch: SortedBatch, *, context_tokens: int = 0
) -> dict[str, tuple[float, list[Packing]]]:
    """Every baseline's (ms, packings) for the step, by name; those that cannot run are left out."""
    best: tuple[float, list[Packing]] | None = None
    holding: tuple[float, list[Packing]] | None = None
    for ms_bound, d in sorted(_homogeneous_bounds(batch)):
        holds = batch.degree_lines[d].capacity >= context_tokens
        if best is not None and ms_bound >= best[0] and (not holds or holding is not None):
            continue
        packings = _homogeneous(batch, d)
        found = (step_ms(batch, packings), packings)
        best = found if best is None or found[0] < best[0] else best
        if holds and (holding is None or found[0] < holding[0]):
            holding = found
    results = {"best_degree_per_batch": best, "fixed_degree": holding}
    rule = megatron_packings(batch)
    results["megatron_dynamic"] = None if rule is None else (step_ms(batch, rule), rule)
    return {name: found for name, found in results.items() if found is not None}


def best_fixed_degree(problems: ScatterProblem | Sequence[ScatterProblem]) -> list[ScatterPlan]:
    """The one degree that is best in total over all the steps, as a plan for each step.

    Degrees that cannot hold the longest document, or a problem's `context_tokens`, are out.

    Raises:
        PlanError: no problems, or no single degree holds every sequence.
    """
    steps = [problems] if isinstance(problems, ScatterProblem) else list(problems)
    if not steps:
        raise PlanError("best_fixed_degree needs at least one problem")
    context = max(problem.context_tokens or 0 for problem in steps)
    by_step = [_by_degree(problem, context) for problem in steps]
    totals = {
        degree: math.fsum(plans[degree].makespan_ms for plans in by_step)
        for degree in sorted(by_step[0])
        if all(degree in plans for plans in by_step)
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
    by_degree = _by_degree(problem, 0)
    if not by_degree:
        raise PlanError("no single degree holds every sequence of this step")
    return min(by_degree.values(), key=lambda plan: plan.makespan_ms)


def fixed_degree(problem: ScatterProblem, degree: int) -> ScatterPlan:
    """The step with every group of this degree.

    Raises:
        PlanError: the degree is not allowed, or does not hold the longest sequence.
    """
    plans = _by_degree(problem, 0)
    if degree not in plans:
        raise PlanError(f"degree {degree} cannot run this step: choose one of {sorted(plans)}")
    return plans[degree]


def megatron_dynamic(problem: ScatterProblem) -> ScatterPlan:
    """Megatron-LM's dynamic context-parallel rule, modelled.

    After `BalancedCPScheduler` (megatron/core/pipeline_parallel/hybrid_cp_schedule.py): from the
    longest down, each sequence opens a group of its smallest sufficient degree while devices
    remain, then joins the group with the least Σs²/degree that has room; what finds none waits
    for the next micro-batch. Its own cost knows neither linear nor exchange terms; the plan's
    time is that of the full cost model.
    """
    batch = SortedBatch.of(problem)
    packings = megatron_packings(batch)
    if packings is None:
        raise PlanError("Megatron's rule leaves a sequence over: no degree holds it alone")
    return to_plan(problem, batch, packings, source="megatron_dynamic")


def _by_degree(problem: ScatterProblem, context_tokens: int) -> dict[int, ScatterPlan]:
    batch = SortedBatch.of(problem)
    return {
        line.degree: to_plan(
            problem, batch, _homogeneous(batch, d), source=f"fixed_degree_{line.degree}"
        )
        for d, line in enumerate(batch.degree_lines)
        if line.capacity >= max(batch.tokens[0], context_tokens)
    }


def _homogeneous_bounds(batch: SortedBatch) -> Iterator[tuple[float, int]]:
    """(a lower bound in ms, degree line) for each degree that holds the longest sequence."""
    for d, line in enumerate(batch.degree_lines):
        if line.capacity >= batch.tokens[0]:
            groups = batch.devices // line.degree
            count = -(-sum(batch.tokens) // (groups * line.capacity))
            yield count * line.fixed + sum(batch.weights[d]) / groups, d


def _homogeneous(batch: SortedBatch, d: int) -> list[Packing]:
    """The step with one degree: sorted, cut into micro-batches, spread over the groups.

    The number of micro-batches is the best of the smallest few that hold the tokens; if memory
    cannot be divided so, groups are filled one after the other.
    """
    line, weights = batch.degree_lines[d], batch.weights[d]
    groups = batch.devices // line.degree
    smallest = -(-sum(batch.tokens) // (groups * line.capacity))
    best, best_ms = _first_fit(batch, d, groups), float("inf")
    for count in range(smallest, smallest + EXTRA_MICRO_BATCHES):
        if count * line.fixed + sum(weights) / groups >= best_ms:
            break
        packings = _cut_evenly(batch, d, groups, count)
        if packings is not None and step_ms(batch, packings) < best_ms:
            best, best_ms = packings, step_ms(batch, packings)
    return best


def _cut_evenly(batch: SortedBatch, d: int, groups: int, count: int) -> list[Packing] | None:
    """Contiguous pieces of about equal device time, each spread over its groups."""
    weights, capacity = batch.weights[d], groups * batch.degree_lines[d].capacity
    share = sum(weights) / count
    bounds, done, tokens = [0], 0.0, 0
    for k, ms in enumerate(weights):
        due = done + ms / 2 >= share * len(bounds) and len(bounds) < count
        if k > bounds[-1] and (due or tokens + batch.tokens[k] > capacity):
            bounds.append(k)
            tokens = 0
        done += ms
        tokens += batch.tokens[k]
    bounds.append(len(weights))
    packings = []
    for first, stop in pairwise(bounds):
        packing = spread(batch, range(first, stop), [d] * groups)
        if packing is None:
            return None
        packings.append(packing)
    return packings


def _first_fit(batch: SortedBatch, d: int, groups: int) -> list[Packing]:
    """One group after the other, filled in order: always fits."""
    filled: list[list[int]] = []
    room = 0
    for k, tokens in enumerate(batch.tokens):
        if not filled or tokens > room:
            filled.append([])
            room = batch.degree_lines[d].capacity
        filled[-1].append(k)
        room -= tokens
    pieces = [filled[i : i + groups] for i in range(0, len(filled), groups)]
    return [[(d, members) for members in piece] for piece in pieces]


def megatron_packings(batch: SortedBatch) -> list[Packing] | None:
    """The packings of `megatron_dynamic`; None if a sequence is left over."""
    packings: list[Packing] = []
    waiting, falling = list(range(len(batch.tokens))), [-tokens for tokens in batch.tokens]
    while waiting:
        packing, waiting, falling = _megatron_batch(batch, waiting, falling)
        if not packing:
            return None
        packings.append(packing)
    return packings


def _megatron_batch(
    batch: SortedBatch, waiting: list[int], falling: list[int]
) -> tuple[Packing, list[int], list[int]]:
    """One micro-batch of the rule, and what it leaves over, longest first.

    `falling` are the waiting sequences' tokens, negated.
    """
    packing: Packing = []
    work = np.zeros(batch.devices)
    room, degree = np.zeros(batch.devices), np.full(batch.devices, -1)
    left, at = batch.devices, 0
    later: list[int] = []
    falling_later: list[int] = []
    while at < len(waiting):
        k = waiting[at]
        d = batch.smallest[k]
        line, tokens = batch.degree_lines[d], batch.tokens[k]
        if line.degree <= left:
            group = len(packing)
            packing.append((d, [k]))
            work[group] = tokens**2 / line.degree
            room[group], degree[group] = line.capacity - tokens, d
            left -= line.degree
            at += 1
            continue
        fitting = np.where((room >= tokens) & (degree >= d), work, np.inf)
        best = int(np.argmin(fitting))
        if fitting[best] < np.inf:
            packing[best][1].append(k)
            work[best] += tokens**2 / batch.degree_lines[packing[best][0]].degree
            room[best] -= tokens
            at += 1
            continue
        # Nothing as long finds a place: on to the first that might, in a group or a new one.
        longest = max(room.max(), *(e.capacity for e in batch.degree_lines if e.degree <= left), 0)
        stop = max(at + 1, bisect_left(falling, -longest, at))
        later += waiting[at:stop]
        falling_later += falling[at:stop]
        at = stop
    return packing, later, falling_later
