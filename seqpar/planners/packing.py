"""Groups for one micro-batch: as much as ends by a target makespan, or spread over given degrees.

A packing is a list of (degree line, members): indices into `SortedBatch.degree_lines`, and into
its sequences. Memory is a hard limit throughout.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from itertools import accumulate
from math import inf, sqrt
from typing import NamedTuple

from seqpar.planners.batch import SortedBatch
from seqpar.planners.cost import DegreeCost

__all__ = ["Packed", "Packing", "Waiting", "makespan", "pack_most", "spread"]

Packing = list[tuple[int, list[int]]]
_Heap = list[tuple[float, int]]


class Waiting:
    """Sequences that wait for a place, longest first, with their sizes and running sums."""

    def __init__(self, batch: SortedBatch, members: Sequence[int]) -> None:
        self.members = list(members)
        self.sizes = [batch.tokens[k] for k in self.members]
        self.falling = [-size for size in self.sizes]
        self.before = [0, *accumulate(self.sizes)]


class Packed(NamedTuple):
    """A packing, when its slowest group ends, and the sequences that found no place.

    `complete` is False if packing stopped early, too much being left over; `steps` counts the
    placements.
    """

    packing: Packing
    makespan_ms: float
    left_over: list[int]
    complete: bool
    steps: int


def makespan(batch: SortedBatch, packing: Packing) -> float:
    """ms of the slowest group."""
    weights, lines = batch.weights, batch.degree_lines
    return max(
        lines[d].fixed + sum(weights[d][k] for k in members) for d, members in packing if members
    )


def pack_most(
    batch: SortedBatch,
    waiting: Waiting,
    target_ms: float,
    *,
    max_left_tokens: float,
    least_line: int = 0,
) -> Packed:
    """Fill groups that all end by the target; stop once more tokens are left over than allowed.

    From the longest sequence down, each goes to the least full group of the smallest degree that
    can take it in time and memory (fullness is the larger of both shares), else to a new group of
    the smallest degree from `least_line` on that ends it in time while devices last; else it is
    left over.

    A group's limit in time is kept as the longest sequence that it could still take, so that both
    limits are one comparison, and runs of sequences that fit nowhere are skipped by bisection.
    """
    lines, weights = batch.degree_lines, batch.weights
    count, sizes, members = len(lines), waiting.sizes, waiting.members
    fresh = [min(line.capacity, _longest(line, target_ms - line.fixed)) for line in lines]
    fresh[:least_line] = [-1.0] * least_line
    fits = [-1.0] * count  # the longest sequence that the least full group of each degree takes
    heaps: list[_Heap] = [[] for _ in lines]
    packing: Packing = []
    ends: list[float] = []
    room: list[int] = []
    left_over: list[int] = []
    left_tokens, steps, at = 0, 0, 0
    devices = batch.devices
    while at < len(members):
        size = sizes[at]
        for d in range(count):
            if size <= fits[d]:
                group = heaps[d][0][1]
                break
        else:
            group = -1
            for d in range(count):
                if size <= fresh[d]:
                    break
            else:
                stop = bisect_left(waiting.falling, -max(max(fits), max(fresh)), at + 1)
                left_tokens += waiting.before[stop] - waiting.before[at]
                left_over += members[at:stop]
                at = stop
                if left_tokens > max_left_tokens:
                    return Packed(packing, max(ends, default=0.0), left_over, False, steps)
                continue
        line, k = lines[d], members[at]
        at += 1
        steps += 1
        if group >= 0:
            packing[group][1].append(k)
            ends[group] += weights[d][k]
            room[group] -= size
        else:
            group = len(packing)
            packing.append((d, [k]))
            ends.append(line.fixed + weights[d][k])
            room.append(line.capacity - size)
            devices -= line.degree
            for larger in range(count):
                if lines[larger].degree > devices:
                    fresh[larger] = -1.0
        by_time = (ends[group] - line.fixed) / (target_ms - line.fixed)
        by_tokens = 1 - room[group] / line.capacity
        entry = (by_time if by_time > by_tokens else by_tokens, group)
        heap = heaps[d]
        if heap and heap[0][1] == group:
            heapreplace(heap, entry)
        else:
            heappush(heap, entry)
        top = heap[0][1]
        longest = _longest(line, target_ms - ends[top])
        fits[d] = longest if longest < room[top] else room[top]
    return Packed(packing, max(ends, default=0.0), left_over, True, steps)


def spread(batch: SortedBatch, members: Sequence[int], degrees: Sequence[int]) -> Packing | None:
    """Longest sequence first, each to the group that would end it first and has the memory.

    `degrees` are degree lines, one a group. Longest-processing-time order on related machines;
    None if a sequence finds no room.
    """
    lines, weights = batch.degree_lines, batch.weights
    packing: Packing = [(d, []) for d in degrees]
    room = [lines[d].capacity for d in degrees]
    heaps: list[_Heap] = [[] for _ in lines]
    for group, d in enumerate(degrees):
        heaps[d].append((lines[d].fixed, group))
    used = [d for d in range(len(lines)) if heaps[d]]
    for k in members:
        tokens = batch.tokens[k]
        best, best_d = float("inf"), -1
        full: list[tuple[int, list[tuple[float, int]]]] = []
        for d in used:
            heap = heaps[d]
            if heap and room[heap[0][1]] < tokens:
                full.append((d, _pop_full(heap, room, tokens)))
            if heap and heap[0][0] + weights[d][k] < best:
                best, best_d = heap[0][0] + weights[d][k], d
        if best_d < 0:
            return None
        group = heaps[best_d][0][1]
        heapreplace(heaps[best_d], (best, group))
        packing[group][1].append(k)
        room[group] -= tokens
        for d, skipped in full:
            for entry in skipped:
                heappush(heaps[d], entry)
    return packing


def _longest(line: DegreeCost, ms: float) -> float:
    """The longest sequence that takes no more than `ms` at this degree, fixed terms apart."""
    if ms < 0:
        return -1.0
    a, b = line.quadratic, line.linear
    if a > 0:
        return (sqrt(b * b + 4 * a * ms) - b) / (2 * a)
    return ms / b if b > 0 else inf


def _pop_full(heap: _Heap, room: list[int], tokens: int) -> list[tuple[float, int]]:
    """Take off the top every group without room for the tokens."""
    skipped = []
    while heap and room[heap[0][1]] < tokens:
        skipped.append(heappop(heap))
    return skipped
