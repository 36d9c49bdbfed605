"""The configuration bound of one micro-batch: column generation, seconds, offline.

A configuration is a degree and a set of sequences that one group of it can run by a makespan C
within its memory. The configuration LP covers every sequence by real amounts of configurations
with the fewest devices. If it needs more devices than there are, no plan ends by C. With duals π
from a restricted LP, Σπ / max over configurations of (Σπ of its sequences / degree) bounds the
devices from below (Farley 1990); pricing is a knapsack with time and memory, whose upper bound
keeps the result valid when its search is cut short. Bisection over C gives the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from seqpar.planners.bounds import Relaxation, degree_bound
from seqpar.planners.knapsack import most_valuable
from seqpar.planners.plan import MicroBatch
from seqpar.planners.problem import ScatterProblem

__all__ = ["configuration_bound"]


def configuration_bound(
    problem: ScatterProblem,
    batch: MicroBatch,
    *,
    precision: float = 0.002,
    max_rounds: int = 60,
    max_nodes: int = 3000,
) -> float:
    """ms that no assignment of the micro-batch's sequences to groups can beat.

    Starts from the degree bound and bisects up to the batch's makespan, to `precision` of it. A
    makespan that column generation settles neither way within `max_rounds` counts as reachable.
    """
    members = [index for group in batch.groups for index in group.sequences]
    low = degree_bound(problem, members, upper_ms=batch.makespan_ms)
    high = batch.makespan_ms
    relaxed = Relaxation(problem, members)
    while high - low > precision * high:
        middle = max((low + high) / 2, high * (1 - 4 * precision))
        if _Columns(relaxed, middle).infeasible(max_rounds, max_nodes):
            low = middle
        else:
            high = middle
    return low


class _Columns:
    """The restricted configuration LP at one makespan, grown by pricing."""

    def __init__(self, relaxed: Relaxation, target_ms: float) -> None:
        import highspy

        self.relaxed = relaxed
        left = target_ms - relaxed.fixed
        self.lines = [d for d in range(len(left)) if left[d] > 0]
        self.time = {d: relaxed.weights[d] / left[d] for d in self.lines}
        capacity = relaxed.degree * relaxed.tokens_per_device
        self.tokens = {d: relaxed.tokens / capacity[d] for d in self.lines}
        self.model = highspy.Highs()
        self.model.setOptionValue("output_flag", False)
        self.model.setOptionValue("threads", 1)
        for _ in relaxed.tokens:
            self.model.addRow(1.0, highspy.kHighsInf, 0, [], [])
        self.infinity = highspy.kHighsInf
        self.coverable = self._add_singletons()

    def infeasible(self, max_rounds: int, max_nodes: int) -> bool:
        """Whether more devices are needed than there are: proven, not merely not found."""
        if not self.coverable:
            return True
        devices = self.relaxed.devices
        for _ in range(max_rounds):
            self.model.run()
            if self.model.getInfo().objective_function_value <= devices * (1 + 1e-9):
                return False
            duals = np.maximum(np.asarray(self.model.getSolution().row_dual), 0.0)
            ratio, grew = self._price(duals, max_nodes)
            if duals.sum() > devices * ratio * (1 + 1e-9):
                return True
            if not grew:
                return False
        return False

    def _price(self, duals: NDArray[np.float64], max_nodes: int) -> tuple[float, bool]:
        """The largest value a device can have, and whether a better configuration was added."""
        ratio, grew = 1.0, False
        for d in self.lines:
            found = most_valuable(duals, self.time[d], self.tokens[d], max_nodes=max_nodes)
            degree = float(self.relaxed.degree[d])
            ratio = max(ratio, found.upper / degree)
            if found.value > degree * (1 + 1e-7):
                self._add(d, found.members)
                grew = True
        return ratio, grew

    def _add_singletons(self) -> bool:
        usable = np.stack([(self.time[d] <= 1) & (self.tokens[d] <= 1) for d in self.lines])
        if not usable.any(axis=0).all():
            return False
        for k, first in enumerate(usable.argmax(axis=0).tolist()):
            self._add(self.lines[first], [k])
        return True

    def _add(self, d: int, members: Sequence[int]) -> None:
        ones = [1.0] * len(members)
        degree = float(self.relaxed.degree[d])
        self.model.addCol(degree, 0.0, self.infinity, len(members), sorted(members), ones)
