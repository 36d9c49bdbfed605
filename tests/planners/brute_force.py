"""The true optimum of tiny problems, by trying everything."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache

from seqpar.planners import ScatterProblem


def partitions(items: tuple[int, ...]) -> Iterator[list[tuple[int, ...]]]:
    """Every way to divide the items into non-empty sets."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for size in range(len(rest) + 1):
        for others in itertools.combinations(rest, size):
            left = tuple(item for item in rest if item not in others)
            for division in partitions(left):
                yield [(first, *others), *division]


def group_ms(problem: ScatterProblem, members: tuple[int, ...], degree: int) -> float:
    lengths = [problem.lengths[i] for i in members]
    if sum(lengths) > degree * problem.tokens_per_device:
        return math.inf
    return problem.cost.group_ms(lengths, degree, nodes=problem.cluster.nodes_spanned(degree))


def best_micro_batch(problem: ScatterProblem, members: tuple[int, ...]) -> float:
    """The least makespan of one micro-batch of these sequences; infinite if they do not fit."""
    return min(
        (_best_degrees(problem, division) for division in partitions(members)), default=math.inf
    )


def _best_degrees(problem: ScatterProblem, division: Sequence[tuple[int, ...]]) -> float:
    degrees = [line.degree for line in problem.degree_costs]
    best = math.inf
    for choice in itertools.product(degrees, repeat=len(division)):
        if sum(choice) <= problem.cluster.devices:
            ends = [group_ms(problem, s, d) for s, d in zip(division, choice, strict=True)]
            best = min(best, max(ends))
    return best


def best_step(problem: ScatterProblem) -> float:
    """The least sum of makespans over every choice of micro-batches."""
    known = cache(lambda members: best_micro_batch(problem, members))
    everything = tuple(range(len(problem.lengths)))
    return min(sum(known(part) for part in division) for division in partitions(everything))
