"""Groups for one micro-batch: as much as ends by a target makespan, or spread over given degrees.

A packing is a list of (degree line, members): indices into `SortedBatch.degree_lines`, and into
its sequences. Memory is a hard limit throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace
from typing import NamedTuple

from seqpar.planners.batch import SortedBatch

__all__ = ["Packed", "Packing", "makespan", "pack_most", "spread"]

Packing = list[tuple[int, list[int]]]
_Heap = list[tuple[float, int]]


class Packed(NamedTuple):
    """A packing, when its slowest group ends, and the sequences that found no place.

    `complete` is False if packing stopped early, too much being left over; `steps` is how many
    sequences were looked at.
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
    batch: SortedBatch, members: Sequence[int], target_ms: float, *, max_left_tokens: float
) -> Packed:
    """Fill groups that all end by the target; stop once more tokens are left over than allowed.

    From the longest sequence down, each goes to the least full group of the smallest degree that
    can take it in time and memory (fullness is the larger of both shares), else to a new group of
    the smallest degree that ends it in time while devices last; else it is left over.
    """
    lines, weights, tokens, smallest = (
        batch.degree_lines,
        batch.weights,
        batch.tokens,
        batch.smallest,
    )
    time_share = [1 / max(target_ms - line.fixed, 1e-9) for line in lines]
    token_share = [1 / line.capacity for line in lines]
    heaps: list[_Heap] = [[] for _ in lines]
    packing: Packing = []
    ends: list[float] = []
    room: list[int] = []
    left_over: list[int] = []
    left_tokens, devices = 0, batch.devices
    for step, k in enumerate(members):
        size = tokens[k]
        chosen = -1
        for d in range(smallest[k], len(lines)):
            heap = heaps[d]
            if heap:
                group = heap[0][1]
                end = ends[group] + weights[d][k]
                if size <= room[group] and end <= target_ms:
                    chosen = d
                    break
        if chosen >= 0:
            d = chosen
            packing[group][1].append(k)
            ends[group] = end
            room[group] -= size
        else:
            d = _new_degree(batch, k, target_ms, devices)
            if d < 0:
                left_over.append(k)
                left_tokens += size
                if left_tokens > max_left_tokens:
                    return Packed(packing, max(ends, default=0.0), left_over, False, step + 1)
                continue
            group = len(packing)
            end = lines[d].fixed + weights[d][k]
            packing.append((d, [k]))
            ends.append(end)
            room.append(lines[d].capacity - size)
            devices -= lines[d].degree
        by_time = (end - lines[d].fixed) * time_share[d]
        by_tokens = 1 - room[group] * token_share[d]
        entry = (by_time if by_time > by_tokens else by_tokens, group)
        if chosen >= 0:
            heapreplace(heaps[d], entry)
        else:
            heappush(heaps[d], entry)
    return Packed(packing, max(ends, default=0.0), left_over, True, len(members))


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


def _new_degree(batch: SortedBatch, k: int, target_ms: float, devices: int) -> int:
    """The smallest degree line that would end the sequence in time in a new group; -1 if none."""
    for d in range(batch.smallest[k], len(batch.degree_lines)):
        line = batch.degree_lines[d]
        if line.degree > devices:
            return -1
        if line.fixed + batch.weights[d][k] <= target_ms:
            return d
    return -1


def _pop_full(heap: _Heap, room: list[int], tokens: int) -> list[tuple[float, int]]:
    """Take off the top every group without room for the tokens."""
    skipped = []
    while heap and room[heap[0][1]] < tokens:
        skipped.append(heappop(heap))
    return skipped
