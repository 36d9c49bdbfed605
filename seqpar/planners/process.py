"""Planning in a process of its own, so that its time is nobody else's.

A planner in a thread of the training process holds Python's interpreter lock for most of its time,
and the step that launches kernels meanwhile waits for it. Here the problem is sent to a process
that imports no torch and does nothing but plan; who waits for the answer holds no lock.
"""

from __future__ import annotations

from seqpar.planners.anytime import Planner
from seqpar.planners.plan import ScatterPlan
from seqpar.planners.problem import ScatterProblem
from seqpar.planners.worker import Worker

__all__ = ["PlannerProcess"]


class PlannerProcess:
    """A planner in another process; its plans are those of `planner.plan` in this one.

    The process starts with the first plan and ends with `close`; `contextlib.closing` makes a
    `with` block of that.

    Args:
        planner: how to plan.
    """

    def __init__(self, planner: Planner) -> None:
        self.planner = planner
        self._worker = Worker()

    def plan(self, problem: ScatterProblem) -> ScatterPlan:
        """`planner.plan(problem)`, in the other process; threads that call it take turns.

        Raises:
            PlanError: whatever planning raises, and if the process has died.
        """
        return self._worker.call(self.planner.plan, problem)

    def close(self) -> None:
        """End the process; a later `plan` starts another."""
        self._worker.close()
