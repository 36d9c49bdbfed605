"""The planner's plans against the best fixed degree, on the same batches, as measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqpar.planners import ScatterPlan, ScatterProblem, best_fixed_degree
from seqpar.report import DegreeComparison
from seqpar.training import PlanExecutor

__all__ = ["compare_with_fixed_degree"]


def compare_with_fixed_degree(
    executor: PlanExecutor,
    problems: Sequence[ScatterProblem],
    plans: Sequence[ScatterPlan],
    batches: Sequence[Sequence[Tensor]],
) -> DegreeComparison:
    """Run forward and backward of each batch by its plan and by the one degree best for all.

    The two take turns, and which goes first alternates, so that a machine whose speed drifts
    favours neither. The parameters are left alone; gradients are left zeroed. Collective.

    Args:
        problems, plans, batches: per batch, what was planned, the plan, and its documents.
    """
    fixed_plans = best_fixed_degree(problems)
    planned_ms, fixed_ms = [], []
    for index, documents in enumerate(batches):
        turns = [(plans[index], planned_ms), (fixed_plans[index], fixed_ms)]
        for plan, times in turns if index % 2 == 0 else reversed(turns):
            executor.model.zero_grad(set_to_none=True)
            times.append(executor.forward_backward(plan, documents).step_ms)
    executor.model.zero_grad(set_to_none=True)
    return DegreeComparison(
        fixed_degree=fixed_plans[0].micro_batches[0].groups[0].degree,
        batches=len(batches),
        planned_ms=planned_ms,
        fixed_ms=fixed_ms,
    )
