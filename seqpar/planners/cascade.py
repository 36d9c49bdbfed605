"""Micro-batches and groups chosen together: a cascade of packings, longest sequences first.

A cascade of M micro-batches is steered by M shares. Micro-batch m takes the least makespan at
which `pack_most` absorbs at least share[m] / (M - m) of the tokens that remain; what finds no
place goes on to the next, the last takes all. So a micro-batch holds the longest sequences that
remain, each at the smallest degree that ends in time, and its gaps are filled with shorter ones
from anywhere in the batch: neither sorted cuts nor a fixed degree vector bind it.

Where memory is tight and sequences are alike, groups of small degrees leave more of it unused than
their cheaper exchange is worth, so each stage also has a least degree.

`CascadeSearch` looks for good shares and least degrees: first equal ones, then changes to one or
two stages of the best found. Cascades that begin alike share their first micro-batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, repeat
from math import inf
from typing import NamedTuple

from seqpar.planners.batch import SortedBatch
from seqpar.planners.clock import Clock
from seqpar.planners.degrees import search_degrees
from seqpar.planners.improve import improve
from seqpar.planners.packing import Packed, Packing
from seqpar.planners.target import least_target

__all__ = ["CascadeSearch", "pack_micro_batch"]

SHARES = (0.97, 1.0, 0.92)
MAX_CHANGES = 100_000
LARGEST_LEAST_LINE = 3
CASCADE_STEPS = 25
"""What a cascade costs, in placements, beside those that it makes."""


class Stage(NamedTuple):
    """How one micro-batch of a cascade is steered: its share, and its least degree line."""

    share: float
    least_line: int = 0


Steering = tuple[Stage, ...]


class CascadeSearch:
    """Searches cascades of one batch; `steps` counts the placements that it has tried.

    The clock ends it early, but not before the first cascade is found.
    """

    def __init__(self, batch: SortedBatch, *, max_steps: int, clock: Clock | None = None) -> None:
        self.batch = batch
        self._lines = batch.degree_lines
        self.max_steps = max_steps
        self.clock = clock or Clock()
        self.steps = 0
        self._prefixes: dict[tuple[int, Steering], Packed | None] = {}
        self._last_ms: dict[int, float] = {}
        self._least_end: list[float] = batch.least(
            batch.weight_array + batch.fixed_array[:, None]
        ).tolist()
        device_ms = batch.least(batch.weight_array * batch.degree_array[:, None])
        self._share_ms: list[float] = (device_ms / batch.devices).tolist()
        self._fixed_ms = float(batch.fixed_array.min())

    def run(self, counts: list[int]) -> Iterator[tuple[float, list[Packing]]]:
        """Better and better (ms, packings), from cascades of these numbers of micro-batches."""
        best_ms, best = inf, tuple[Stage, ...]()
        rng = random.Random(0)
        for first in chain(self._first(counts), repeat(None, MAX_CHANGES)):
            spent = self.steps > self.max_steps or self.clock.is_over()
            if (best and spent) or (first is None and not best):
                return
            tried = first or self._change(rng, best)
            self.steps += CASCADE_STEPS
            found = self._cascade(tried, below_ms=best_ms)
            if found is not None:
                best_ms, best = found[0], tried
                yield found

    def _first(self, counts: list[int]) -> Iterator[Steering]:
        """Equal stages: every share and count, and the likeliest count from larger degrees on."""
        for share in SHARES:
            for count in counts:
                yield (Stage(share),) * count
            if share == SHARES[0]:
                for least_line in range(1, min(LARGEST_LEAST_LINE + 1, len(self._lines))):
                    yield (Stage(share, least_line),) * counts[0]

    def _change(self, rng: random.Random, steering: Steering) -> Steering:
        """One or two stages changed, the earlier the likelier; sometimes their number too."""
        moved = list(steering)
        if rng.random() < 0.1:
            if rng.random() < 0.5:
                moved.append(Stage(1.0))
            elif len(moved) > 1:
                moved.pop()
        for _ in range(1 + (rng.random() < 0.4)):
            at = int(max(1, len(moved) - 1) * rng.random() ** 1.7)
            share, least_line = moved[at]
            redrawn = rng.random() < 0.5
            share = rng.uniform(0.45, 1.1) if redrawn else share * rng.uniform(0.88, 1.12)
            if rng.random() < 0.1:
                least_line = rng.randint(0, min(LARGEST_LEAST_LINE, len(self._lines) - 1))
            moved[at] = Stage(round(share, 3), least_line)
        return tuple(moved)

    def _cascade(
        self, steering: Steering, *, below_ms: float
    ) -> tuple[float, list[Packing]] | None:
        """The cascade that is steered so; None if it fails or is no better."""
        waiting = list(range(len(self.batch.tokens)))
        total, packings = 0.0, []
        for m in range(len(steering)):
            if below_ms < inf and self.clock.is_over():
                return None
            packed = self._pack(steering, m, waiting)
            if packed is None:
                return None
            total += packed.makespan_ms
            packings.append(packed.packing)
            waiting = packed.left_over
            if total + self._rest_bound(waiting) >= below_ms:
                return None
            if not waiting:
                return total, packings
        return None

    def _rest_bound(self, waiting: list[int]) -> float:
        """ms that the micro-batches still to come cannot beat."""
        tokens = sum(self.batch.tokens[k] for k in waiting)
        count = -(-tokens // (self.batch.devices * self.batch.device_token_capacity))
        return count * self._fixed_ms + sum(self._share_ms[k] for k in waiting)

    def _pack(self, steering: Steering, m: int, waiting: list[int]) -> Packed | None:
        """Micro-batch m of a cascade, from an earlier cascade that began alike if there is one."""
        key = (len(steering), steering[: m + 1])
        if key not in self._prefixes:
            remaining = sum(self.batch.tokens[k] for k in waiting)
            share = steering[m].share / (len(steering) - m)
            absorbed = 1.0 if m == len(steering) - 1 else min(1.0, share)
            found, steps = least_target(
                self.batch,
                waiting,
                self._least_end,
                (1 - absorbed) * remaining,
                least_line=steering[m].least_line,
                guess_ms=self._last_ms.get(m, 0.0),
            )
            self.steps += steps
            if found is not None:
                self._last_ms[m] = found.makespan_ms
            self._prefixes[key] = found
        return self._prefixes[key]


def pack_micro_batch(
    batch: SortedBatch, members: list[int], *, max_vectors: int = 400
) -> Packing | None:
    """Groups for these sequences in one micro-batch; None if memory was not found to hold them."""
    least_end = batch.least(batch.weight_array + batch.fixed_array[:, None]).tolist()
    found, _ = least_target(batch, members, least_end, 0.0)
    start = improve(batch, found.packing, max_steps=100) if found else None
    return search_degrees(batch, members, start, max_vectors=max_vectors)
