"""The planner's plans against the best fixed degree, on the same batches, as measured."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from seqpar.data import PlannedStep
from seqpar.planners import ScatterPlan
from seqpar.report import DegreeComparison
from seqpar.training import PlanExecutor, StepResult

__all__ = ["FixedDegreeRival"]


class FixedDegreeRival:
    """Runs some steps' batches a second time, by plans of one degree, and keeps both times.

    The two runs of a batch stand next to each other in time, and which goes first alternates, so
    that a machine whose speed drifts favours neither. Only the planned run's gradients stay.

    Args:
        executor: runs both. Collective: every rank has the same rival.
        plans: by step, the plan of that step's batch at the fixed degree.
    """

    def __init__(self, executor: PlanExecutor, plans: dict[int, ScatterPlan]) -> None:
        self.executor = executor
        self.plans = plans
        self.planned_ms: list[float] = []
        self.fixed_ms: list[float] = []

    def forward_backward(self, planned: PlannedStep, documents: Sequence[Tensor]) -> StepResult:
        """The step by its own plan; before or after it, the rival's if the step is compared."""
        rival = self.plans.get(planned.step)
        if rival is None:
            return self.executor.forward_backward(planned.plan, documents)
        goes_first = len(self.fixed_ms) % 2 == 0
        if goes_first:
            self._time(rival, documents)
        result = self.executor.forward_backward(planned.plan, documents)
        if not goes_first:
            gradients = [parameter.grad for parameter in self.executor.model.parameters()]
            self._time(rival, documents)
            for parameter, gradient in zip(
                self.executor.model.parameters(), gradients, strict=True
            ):
                parameter.grad = gradient
        self.planned_ms.append(result.step_ms)
        return result

    def result(self) -> DegreeComparison:
        degrees = {g.degree for p in self.plans.values() for m in p.micro_batches for g in m.groups}
        return DegreeComparison(
            fixed_degree=max(degrees, default=1),
            batches=len(self.fixed_ms),
            planned_ms=tuple(self.planned_ms),
            fixed_ms=tuple(self.fixed_ms),
        )

    def _time(self, plan: ScatterPlan, documents: Sequence[Tensor]) -> None:
        self.executor.model.zero_grad(set_to_none=True)
        self.fixed_ms.append(self.executor.forward_backward(plan, documents).step_ms)
        self.executor.model.zero_grad(set_to_none=True)
