"""Lower bounds: what no plan can beat.

Degree bound, for one micro-batch and a makespan C: a sequence may run at a degree if alone it
would end there by C. Suppose sequences may be divided between degrees and degrees given any
real number of devices. Then degree d needs at least

    max(device-ms of its sequences / (C - fixed_d), tokens of its sequences / tokens per device)

devices. Tokens per device are the same at every degree, so the sum of the second terms does not
depend on who runs where, and each sequence's cheapest degree is the one of least device time: if
either sum exceeds the devices, no plan ends by C. Bisection over C gives the bound.

Step bound, for any choice of micro-batches: the fixed cost of as few micro-batches as memory
allows plus all device time over all devices, or the longest sequence alone, if that is more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from seqpar.planners.problem import ScatterProblem

__all__ = ["Relaxation", "degree_bound", "step_bound"]

PRECISION = 1e-7


class Relaxation:
    """Weights of some sequences at each degree, the cheapest strategy term by term."""

    def __init__(self, problem: ScatterProblem, members: Sequence[int]) -> None:
        lengths = np.asarray([problem.lengths[index] for index in members], dtype=np.float64)
        self.tokens = lengths
        self.devices = problem.cluster.devices
        self.tokens_per_device = float(problem.tokens_per_device)
        quadratic, linear, fixed = [], [], []
        for line in problem.degree_costs:
            nodes = problem.cluster.nodes_spanned(line.degree)
            lines = problem.cost.lines(line.degree, nodes=nodes)
            quadratic.append(min(row[1] for row in lines))
            linear.append(min(row[2] for row in lines))
            fixed.append(min(row[3] for row in lines))
        self.degree = np.asarray([line.degree for line in problem.degree_costs], dtype=np.float64)
        self.fixed = np.asarray(fixed)
        self.weights = np.outer(quadratic, lengths * lengths) + np.outer(linear, lengths)
        capacity = np.asarray([line.capacity for line in problem.degree_costs], dtype=np.float64)
        self.holds = lengths[None, :] <= capacity[:, None]
        self.device_ms = self.weights * self.degree[:, None]

    def least_end(self) -> NDArray[np.float64]:
        """[K]: when each sequence alone would end at its best degree."""
        ends = np.where(self.holds, self.weights + self.fixed[:, None], np.inf)
        least: NDArray[np.float64] = ends.min(axis=0)
        return least

    def devices_needed(self, target_ms: float) -> float:
        """A lower bound on the devices that end every sequence by the target; inf if none do."""
        left = target_ms - self.fixed
        usable = self.holds & (self.weights <= left[:, None])
        if not usable.any(axis=0).all():
            return math.inf
        with np.errstate(divide="ignore", invalid="ignore"):
            by_time = np.where(usable, self.device_ms / left[:, None], np.inf).min(axis=0)
        # The memory term is the same at every degree, so each sequence's choice is by time alone.
        return max(float(by_time.sum()), float(self.tokens.sum()) / self.tokens_per_device)


def degree_bound(
    problem: ScatterProblem, members: Sequence[int], *, upper_ms: float = math.inf
) -> float:
    """ms that no assignment of these sequences to groups of one micro-batch can beat.

    `upper_ms`: a makespan that is known to be reachable; the search stops there.
    """
    relaxed = Relaxation(problem, members)
    low = float(relaxed.least_end().max())
    if relaxed.devices_needed(low) <= relaxed.devices:
        return low
    high = low
    while relaxed.devices_needed(high) > relaxed.devices and high < upper_ms:
        low, high = high, high * 1.5
    high = min(high, upper_ms)
    while high - low > PRECISION * low:
        middle = (low + high) / 2
        if relaxed.devices_needed(middle) > relaxed.devices:
            low = middle
        else:
            high = middle
    return low


def step_bound(problem: ScatterProblem) -> float:
    """ms that no plan of these sequences can beat, whatever its micro-batches."""
    relaxed = Relaxation(problem, range(len(problem.lengths)))
    capacity = problem.tokens_per_device * problem.cluster.devices
    fewest = -(-sum(problem.lengths) // capacity)
    fixed = float(relaxed.fixed.min())
    device_ms = np.where(relaxed.holds, relaxed.device_ms, np.inf).min(axis=0)
    shared = fewest * fixed + float(device_ms.sum()) / relaxed.devices
    alone = float(relaxed.least_end().max()) + (fewest - 1) * fixed
    return max(shared, alone)
