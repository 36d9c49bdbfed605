"""Groups for one micro-batch: pack to a target makespan, or spread over given degrees.

A packing is a list of (degree line, members): indices into `SortedBatch.degree_lines`, and into
its sequences. Both routines take memory as a hard limit and answer None when they fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappop, heappush, heapreplace

from seqpar.planners.batch import SortedBatch

__all__ = ["Packing", "makespan", "pack_to_target", "spread"]

Packing = list[tuple[int, list[int]]]
_Heap = list[tuple[float, int]]


def makespan(batch: SortedBatch, packing: Packing) -> float:
    """ms of the slowest group."""
    weights, lines = batch.weights, batch.degree_lines
    return max(
        lines[d].fixed + sum(weights[d][k] for k in members) for d, members in packing if members
    )


def pack_to_target(
    batch: SortedBatch, members: Sequence[int], target_ms: float, *, fill_first: bool
) -> Packing | None:
    """Groups that all end by the target, opened as they are needed, longest sequence first.

    A sequence goes to the smallest degree that can end in time. `fill_first` prefers the room
    left in open groups to a new group; otherwise new groups open while devices remain.
    """
    lines, weights = batch.degree_lines, batch.weights
    groups: Packing = []
    room: list[int] = []
    heaps: list[_Heap] = [[] for _ in lines]
    left = batch.devices
    for k in members:
        fresh = _new_degree(batch, k, target_ms, left)
        placed = False
        if fill_first or fresh < 0:
            for d in range(batch.smallest[k], len(lines)):
                if _add(heaps[d], groups, room, k, weights[d][k], batch.tokens[k], target_ms):
                    placed = True
                    break
        if not placed and fresh < 0:
            return None
        if not placed:
            heappush(heaps[fresh], (lines[fresh].fixed + weights[fresh][k], len(groups)))
            room.append(lines[fresh].capacity - batch.tokens[k])
            groups.append((fresh, [k]))
            left -= lines[fresh].degree
    return groups


def spread(batch: SortedBatch, members: Sequence[int], degrees: Sequence[int]) -> Packing | None:
    """Longest sequence first, each to the group that would end it first and has the memory.

    `degrees` are degree lines, one a group. Longest-processing-time order on related machines.
    """
    lines, weights = batch.degree_lines, batch.weights
    groups: Packing = [(d, []) for d in degrees]
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
        groups[group][1].append(k)
        room[group] -= tokens
        for d, skipped in full:
            for entry in skipped:
                heappush(heaps[d], entry)
    return groups


def _new_degree(batch: SortedBatch, k: int, target_ms: float, left: int) -> int:
    """The smallest degree line that would end the sequence in time in a new group; -1 if none."""
    for d in range(batch.smallest[k], len(batch.degree_lines)):
        line = batch.degree_lines[d]
        if line.degree > left:
            return -1
        if line.fixed + batch.weights[d][k] <= target_ms:
            return d
    return -1


def _add(
    heap: _Heap, groups: Packing, room: list[int], k: int, ms: float, tokens: int, target_ms: float
) -> bool:
    """Put the sequence into the group that ends first of those with the memory, if in time."""
    skipped = _pop_full(heap, room, tokens) if heap and room[heap[0][1]] < tokens else []
    fits = bool(heap) and heap[0][0] + ms <= target_ms
    if fits:
        end, group = heap[0]
        heapreplace(heap, (end + ms, group))
        groups[group][1].append(k)
        room[group] -= tokens
    for entry in skipped:
        heappush(heap, entry)
    return fits


def _pop_full(heap: _Heap, room: list[int], tokens: int) -> list[tuple[float, int]]:
    """Take off the top every group without room for the tokens."""
    skipped = []
    while heap and room[heap[0][1]] < tokens:
        skipped.append(heappop(heap))
    return skipped
