"""The least makespan at which one micro-batch absorbs enough of what waits."""

from __future__ import annotations

from seqpar.planners.batch import SortedBatch
from seqpar.planners.packing import Packed, Waiting, pack_most

__all__ = ["least_target"]

PRECISION = 0.006
FURTHEST = 64.0
"""A target so many times the longest sequence's own time is out of reach."""


def least_target(
    batch: SortedBatch,
    members: list[int],
    least_end: list[float],
    max_left_tokens: float,
    *,
    least_line: int = 0,
    guess_ms: float = 0.0,
) -> tuple[Packed | None, int]:
    """The packing of about the least target that leaves no more tokens over, and its steps.

    The first of `members` (the longest) is never left over. None if no target in reach succeeds,
    which means memory: sequences that do not fit together however long the micro-batch takes.
    `guess_ms` is where to look first.
    """
    low = least_end[members[0]] * (1 + 1e-9)
    capacity = batch.devices * batch.device_token_capacity
    if sum(batch.tokens[k] for k in members) - capacity > max_left_tokens:
        return None, 1
    attempts = _Attempts(batch, members, max_left_tokens, least_line)
    best = attempts.at(low)
    if best is None:
        low, best = _raised(attempts, low, guess_ms)
        if best is not None:
            low, best = _lowered(attempts, low, best)
            best = _bisected(attempts, low, best)
    return best, attempts.steps


class _Attempts:
    """Packs the same sequences to one target after the other; `steps` counts the placements."""

    def __init__(
        self, batch: SortedBatch, members: list[int], max_left_tokens: float, least_line: int
    ) -> None:
        self.batch, self.longest = batch, members[0]
        self.waiting = Waiting(batch, members)
        self.max_left_tokens, self.least_line = max_left_tokens, least_line
        self.steps = 0

    def at(self, target_ms: float) -> Packed | None:
        """The packing, if it absorbs enough."""
        packed = pack_most(
            self.batch,
            self.waiting,
            target_ms,
            max_left_tokens=self.max_left_tokens,
            least_line=self.least_line,
        )
        self.steps += packed.steps
        if not packed.complete or (packed.left_over and packed.left_over[0] == self.longest):
            return None
        return packed


def _raised(attempts: _Attempts, low: float, guess_ms: float) -> tuple[float, Packed | None]:
    """From a target that fails to one that succeeds, by growing steps from the guess."""
    limit, step = low * FURTHEST, 1.06
    high = max(guess_ms * 1.003, low * step)
    while (packed := attempts.at(high)) is None:
        if high > limit:
            return low, None
        low, high = high, high * step
        step *= step
    return low, packed


def _lowered(attempts: _Attempts, low: float, best: Packed) -> tuple[float, Packed]:
    """Down again by growing steps, to the highest target seen to fail: a guess may be far off."""
    step = 0.97
    while best.makespan_ms * step > low:
        target_ms = best.makespan_ms * step
        packed = attempts.at(target_ms)
        if packed is None:
            return target_ms, best
        best = packed
        step *= step
    return low, best


def _bisected(attempts: _Attempts, low: float, best: Packed) -> Packed:
    """The best packing between a target that fails and one that succeeds."""
    while best.makespan_ms > low * (1 + PRECISION):
        middle = (low * best.makespan_ms) ** 0.5
        packed = attempts.at(middle)
        if packed is None:
            low = middle
        else:
            best = packed
    return best
