"""A plan with its lower bounds: what it is certified by."""

from __future__ import annotations

import time

from seqpar.planners.bounds import degree_bound, step_bound
from seqpar.planners.configuration import configuration_bound
from seqpar.planners.plan import MicroBatch, ScatterPlan, with_bounds
from seqpar.planners.problem import ScatterProblem
from seqpar.planners.workers import Workers, map_with

__all__ = ["bound_plan"]


def bound_plan(
    problem: ScatterProblem,
    plan: ScatterPlan,
    *,
    kind: str = "degree",
    workers: Workers | None = None,
) -> ScatterPlan:
    """The plan with a lower bound of that kind for each micro-batch, and the step's bound.

    Workers share the micro-batches of a configuration bound.
    """
    start = time.perf_counter()
    if kind == "configuration":
        tasks = [(problem, batch) for batch in plan.micro_batches]
        bounds = map_with(workers, _configuration_bound, tasks)
    else:
        bounds = [_degree_bound(problem, batch) for batch in plan.micro_batches]
    step = step_bound(problem)
    elapsed = (time.perf_counter() - start) * 1e3
    return with_bounds(plan, bounds=bounds, step_bound=step, kind=kind, bound_ms=elapsed)


def _degree_bound(problem: ScatterProblem, batch: MicroBatch) -> float:
    members = [index for group in batch.groups for index in group.sequences]
    return degree_bound(problem, members, upper_ms=batch.makespan_ms)


def _configuration_bound(task: tuple[ScatterProblem, MicroBatch]) -> float:
    return configuration_bound(*task)
