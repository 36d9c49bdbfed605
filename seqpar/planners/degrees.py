"""Search over degree vectors for one micro-batch whose sequences are given.

A degree vector says which groups there are; `spread` deals the sequences to them and `improve`
evens them out. From a few starts the search goes to vectors one split, merge or growth away, as
long as that helps. Where memory is too tight to balance by time, sequences are first fitted by
memory alone, each into the group that it fills best.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence

from seqpar.planners.batch import SortedBatch
from seqpar.planners.clock import Clock
from seqpar.planners.improve import improve
from seqpar.planners.packing import Packing, makespan, spread

__all__ = ["search_degrees"]

Vector = tuple[int, ...]
"""Degree lines of the groups, rising."""

PROMISING = 1.1
POLISH_STEPS = 40


def search_degrees(
    batch: SortedBatch,
    members: Sequence[int],
    start: Packing | None,
    *,
    max_vectors: int,
    clock: Clock | None = None,
) -> Packing | None:
    """The best groups found for these sequences within that many vectors; None if none fits.

    `start` is a packing to begin with and to return if nothing is better. The clock ends the
    search early.
    """
    search = _Search(batch, members, start, max_vectors, clock or Clock())
    if start is not None:
        search.climb(tuple(sorted(d for d, group in start if group)))
    for vector in _first_vectors(batch, members):
        if search.offer(vector):
            search.climb(vector)
    return search.best


class _Search:
    def __init__(
        self,
        batch: SortedBatch,
        members: Sequence[int],
        start: Packing | None,
        left: int,
        clock: Clock,
    ) -> None:
        self.batch, self.members, self.left, self.clock = batch, members, left, clock
        self.best = start
        self.best_ms = makespan(batch, start) if start is not None else float("inf")
        self.tried: set[Vector] = set()

    def climb(self, vector: Vector) -> None:
        """Go to the first better neighbour until there is none."""
        better: Vector | None = vector
        while better is not None:
            better = next((v for v in _neighbours(self.batch, better) if self.offer(v)), None)

    def offer(self, vector: Vector) -> bool:
        """Whether the vector's packing is better than the best so far; keeps it if so."""
        if vector in self.tried or self.left <= 0 or self.clock.is_over():
            return False
        self.tried.add(vector)
        self.left -= 1
        packing = spread(self.batch, self.members, vector)
        if packing is None:
            packing = _fit(self.batch, self.members, vector)
        elif makespan(self.batch, packing) > PROMISING * self.best_ms:
            return False
        if packing is None:
            return False
        packing = improve(self.batch, packing, max_steps=POLISH_STEPS, clock=self.clock)
        found_ms = makespan(self.batch, packing)
        if found_ms >= self.best_ms * (1 - 1e-9):
            return False
        self.best, self.best_ms = packing, found_ms
        return True


def _first_vectors(batch: SortedBatch, members: Sequence[int]) -> Iterator[Vector]:
    """One degree throughout; and the longest few sequences each in a group of its own."""
    lines = batch.degree_lines
    longest = batch.smallest[members[0]]
    for d in range(longest, len(lines)):
        yield (d,) * (batch.devices // lines[d].degree)
    for extra in (0, 1, 2):
        left, vector = batch.devices, []
        for k in members:
            d = min(len(lines) - 1, batch.smallest[k] + extra)
            if lines[d].degree <= left:
                vector.append(d)
                left -= lines[d].degree
        if sum(lines[d].capacity for d in vector) >= sum(batch.tokens[k] for k in members):
            yield tuple(sorted(vector))


def _neighbours(batch: SortedBatch, vector: Vector) -> Iterator[Vector]:
    """Vectors one split, merge or growth away, and with idle devices put to use."""
    lines = batch.degree_lines
    left = batch.devices - sum(lines[d].degree for d in vector)
    if left:
        yield tuple(sorted((*vector, *_fill(batch, left))))
    for i, d in enumerate(vector):
        if i and vector[i - 1] == d:
            continue
        rest = vector[:i] + vector[i + 1 :]
        for smaller in range(d - 1, -1, -1):
            pieces = lines[d].degree // lines[smaller].degree
            unused = lines[d].degree - pieces * lines[smaller].degree
            yield tuple(sorted((*rest, *(smaller,) * pieces, *_fill(batch, unused))))
        for larger in range(d + 1, len(lines)):
            wanted = lines[larger].degree - lines[d].degree - left
            merged = list(rest)
            while wanted > 0 and merged:
                wanted -= lines[merged.pop(0)].degree
            if wanted <= 0:
                yield tuple(sorted((*merged, larger, *_fill(batch, -wanted))))


def _fill(batch: SortedBatch, devices: int) -> list[int]:
    """Degree lines, largest first, that use up to that many devices."""
    found = []
    for d in range(len(batch.degree_lines) - 1, -1, -1):
        degree = batch.degree_lines[d].degree
        found += [d] * (devices // degree)
        devices %= degree
    return found


def _fit(batch: SortedBatch, members: Sequence[int], vector: Vector) -> Packing | None:
    """Each sequence, longest first, into the group that it leaves the least room in."""
    packing: Packing = [(d, []) for d in vector]
    rooms = sorted((batch.degree_lines[d].capacity, group) for group, d in enumerate(vector))
    for k in members:
        at = bisect_left(rooms, (batch.tokens[k], -1))
        if at == len(rooms):
            return None
        room, group = rooms.pop(at)
        packing[group][1].append(k)
        insort(rooms, (room - batch.tokens[k], group))
    return packing
