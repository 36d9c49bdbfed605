"""Micro-batches and groups chosen together: a cascade of packings, longest sequences first.

A cascade of M micro-batches is steered by M shares. Micro-batch m takes the least makespan at
which `pack_most` absorbs at least share[m] / (M - m) of the tokens that remain; what finds no
place goes on to the next, the last takes all. So a micro-batch holds the longest sequences that
remain, each at the smallest degree that ends in time, and its gaps are filled with shorter ones
from anywhere in the batch: neither sorted cuts nor a fixed degree vector bind it.

`CascadeSearch` looks for good shares: first equal ones, then changes to one or two of the best
found. Cascades that agree in their first shares reuse each other's first micro-batches.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from itertools import chain, repeat

from seqpar.planners.batch import SortedBatch
from seqpar.planners.degrees import search_degrees
from seqpar.planners.improve import improve
from seqpar.planners.packing import Packed, Packing, Waiting, pack_most

__all__ = ["CascadeSearch", "least_target", "pack_micro_batch"]

SHARES = (0.97, 1.0, 0.92)
TARGET_PRECISION = 0.006
MAX_CHANGES = 100_000
_Key = tuple[int, tuple[float, ...]]


class CascadeSearch:
    """Searches cascades of one batch; `steps` counts the placements that it has tried.

    `deadline_s` (of `time.perf_counter`) stops it on a machine that is far too slow.
    """

    def __init__(
        self, batch: SortedBatch, *, max_steps: int, deadline_s: float = float("inf")
    ) -> None:
        self.batch = batch
        self.max_steps = max_steps
        self.deadline_s = deadline_s
        self.steps = 0
        self._prefixes: dict[_Key, Packed | None] = {}
        self._least_end: list[float] = batch.least(
            batch.weight_array + batch.fixed_array[:, None]
        ).tolist()
        device_ms = batch.least(batch.weight_array * batch.degree_array[:, None])
        self._share_ms: list[float] = (device_ms / batch.devices).tolist()
        self._fixed_ms = float(batch.fixed_array.min())

    def run(self, counts: list[int]) -> Iterator[tuple[float, list[Packing]]]:
        """Better and better (ms, packings), from cascades of these numbers of micro-batches."""
        best_ms, best_shares = float("inf"), tuple[float, ...]()
        rng = random.Random(0)
        for shares in chain(_equal_shares(counts), repeat(None, MAX_CHANGES)):
            spent = self.steps > self.max_steps or time.perf_counter() > self.deadline_s
            if best_shares and spent:
                return
            if shares is None and not best_shares:
                return
            tried = shares or self._change(rng, best_shares)
            found = self._cascade(tried, below_ms=best_ms)
            if found is not None:
                best_ms, best_shares = found[0], tried
                yield found

    def _change(self, rng: random.Random, shares: tuple[float, ...]) -> tuple[float, ...]:
        """One or two shares redrawn or moved a little, the earlier the likelier; or a new count."""
        moved = list(shares)
        if rng.random() < 0.1:
            if rng.random() < 0.5:
                moved.append(1.0)
            elif len(moved) > 1:
                moved.pop()
        for _ in range(1 + (rng.random() < 0.4)):
            at = int(max(1, len(moved) - 1) * rng.random() ** 1.7)
            redrawn = rng.random() < 0.5
            share = rng.uniform(0.45, 1.1) if redrawn else moved[at] * rng.uniform(0.88, 1.12)
            moved[at] = round(share, 3)
        return tuple(moved)

    def _cascade(
        self, shares: tuple[float, ...], *, below_ms: float
    ) -> tuple[float, list[Packing]] | None:
        """The cascade of these shares; None if it fails or is no better."""
        waiting = list(range(len(self.batch.tokens)))
        total, packings = 0.0, []
        for m in range(len(shares)):
            stage = self._stage(shares, m, waiting)
            if stage is None:
                return None
            total += stage.makespan_ms
            packings.append(stage.packing)
            waiting = stage.left_over
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

    def _stage(self, shares: tuple[float, ...], m: int, waiting: list[int]) -> Packed | None:
        """Micro-batch m of a cascade, from the earlier ones with the same shares if known."""
        key = (len(shares), shares[: m + 1])
        if key not in self._prefixes:
            remaining = sum(self.batch.tokens[k] for k in waiting)
            last = m == len(shares) - 1
            absorbed = 1.0 if last else min(1.0, shares[m] / (len(shares) - m))
            found, steps = least_target(
                self.batch, waiting, self._least_end, (1 - absorbed) * remaining
            )
            self.steps += steps
            self._prefixes[key] = found
        return self._prefixes[key]


def least_target(
    batch: SortedBatch, members: list[int], least_end: list[float], max_left_tokens: float
) -> tuple[Packed | None, int]:
    """The packing of about the least target that leaves no more tokens over, and its steps.

    The first of `members` (the longest) is never left over. None if no target in reach succeeds,
    which means memory: sequences that do not fit together however long the micro-batch takes.
    """
    low = least_end[members[0]] * (1 + 1e-9)
    capacity = batch.devices * batch.device_token_capacity
    if sum(batch.tokens[k] for k in members) - capacity > max_left_tokens:
        return None, 1
    steps, waiting = 0, Waiting(batch, members)

    def attempt(target_ms: float) -> Packed | None:
        nonlocal steps
        packed = pack_most(batch, waiting, target_ms, max_left_tokens=max_left_tokens)
        steps += packed.steps
        if not packed.complete or (packed.left_over and packed.left_over[0] == members[0]):
            return None
        return packed

    high, step = low, 1.06
    best = attempt(high)
    if best is not None:
        return best, steps
    limit = low * 64 + 1e-9
    while best is None:
        if high > limit:
            return None, steps
        low, high = high, high * step
        step *= step
        best = attempt(high)
    high = best.makespan_ms
    while high > low * (1 + TARGET_PRECISION):
        middle = (low * high) ** 0.5
        packed = attempt(middle)
        if packed is None:
            low = middle
        else:
            best, high = packed, packed.makespan_ms
    return best, steps


def pack_micro_batch(
    batch: SortedBatch, members: list[int], *, max_vectors: int = 400
) -> Packing | None:
    """Groups for these sequences in one micro-batch; None if memory was not found to hold them."""
    least_end = batch.least(batch.weight_array + batch.fixed_array[:, None]).tolist()
    found, _ = least_target(batch, members, least_end, 0.0)
    start = improve(batch, found.packing, max_steps=100) if found else None
    return search_degrees(batch, members, start, max_vectors=max_vectors)


def _equal_shares(counts: list[int]) -> Iterator[tuple[float, ...]]:
    for share in SHARES:
        for count in counts:
            yield (share,) * count
