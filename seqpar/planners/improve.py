"""Local search on one micro-batch: move or swap sequences out of the slowest group."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from seqpar.planners.batch import SortedBatch
from seqpar.planners.clock import Clock
from seqpar.planners.packing import Packing

__all__ = ["improve"]

Changes = list[tuple[int, int]]
"""(sequence, the group that it goes to)."""


def improve(
    batch: SortedBatch, packing: Packing, *, max_steps: int, clock: Clock | None = None
) -> Packing:
    """Shorten the slowest group by the best move or swap until none helps.

    Each step looks at every sequence of the slowest group against every group (move) and every
    sequence outside it (swap), memory respected, and takes what leaves the smaller maximum of the
    two groups touched. Ends early when the clock says so.
    """
    if len(packing) < 2:
        return packing
    state = _State(batch, packing)
    for _ in range(max_steps):
        if clock is not None and clock.is_over():
            break
        slow = state.slowest()
        inside = np.flatnonzero(state.home == slow)
        moved_ms, move = state.best_move(slow, inside)
        swapped_ms, swap = state.best_swap(slow, inside)
        best_ms, changes = (swapped_ms, swap) if swapped_ms < moved_ms else (moved_ms, move)
        if not best_ms < state.ends[slow] * (1 - 1e-12):
            break
        state.apply(changes)
    return state.packing()


class _State:
    """Sequences j with their homes; groups g with their ends and their room."""

    def __init__(self, batch: SortedBatch, packing: Packing) -> None:
        lines = batch.degree_lines
        self.members = np.asarray([k for _, group in packing for k in group])
        self.tokens = batch.token_array[self.members]
        self.weights = batch.weight_array[:, self.members]
        self.degree = np.asarray([d for d, _ in packing])
        sizes = [len(group) for _, group in packing]
        self.home: NDArray[Any] = np.repeat(np.arange(len(packing)), sizes)
        self.ends = np.asarray([lines[d].fixed for d in self.degree])
        self.room = np.asarray([lines[d].capacity for d in self.degree], dtype=np.float64)
        own_ms = self.weights[self.degree[self.home], np.arange(len(self.members))]
        np.add.at(self.ends, self.home, own_ms)
        np.subtract.at(self.room, self.home, self.tokens)

    def slowest(self) -> int:
        """The group that ends last; one without sequences is not run, whatever it would cost."""
        used = np.bincount(self.home, minlength=len(self.ends))
        return int(np.argmax(np.where(used, self.ends, -np.inf)))

    def best_move(self, slow: int, inside: NDArray[Any]) -> tuple[float, Changes]:
        """The later end of the two groups after the best move out of the slow group."""
        there = self.ends[None, :] + self.weights[np.ix_(self.degree, inside)].T
        here = self.ends[slow] - self.weights[self.degree[slow], inside]
        after = np.maximum(there, here[:, None])
        after[:, slow] = np.inf
        after[self.tokens[inside][:, None] > self.room[None, :]] = np.inf
        i, group = divmod(int(np.argmin(after)), len(self.ends))
        return float(after[i, group]), [(int(inside[i]), group)]

    def best_swap(self, slow: int, inside: NDArray[Any]) -> tuple[float, Changes]:
        """The later end of the two groups after the best exchange with another group."""
        outside = np.flatnonzero(self.home != slow)
        if not len(outside):
            return float("inf"), []
        other = self.home[outside]
        given = self.weights[self.degree[slow], inside]
        taken = self.weights[self.degree[slow], outside]
        gone = self.weights[self.degree[other], outside]
        come = self.weights[np.ix_(self.degree[other], inside)].T
        after = np.maximum(
            (self.ends[other] - gone)[None, :] + come,
            (self.ends[slow] - given)[:, None] + taken[None, :],
        )
        growth = self.tokens[inside][:, None] - self.tokens[outside][None, :]
        after[(growth > self.room[other][None, :]) | (-growth > self.room[slow])] = np.inf
        i, j = divmod(int(np.argmin(after)), len(outside))
        return float(after[i, j]), [(int(inside[i]), int(other[j])), (int(outside[j]), slow)]

    def apply(self, changes: Changes) -> None:
        """Send sequences to their new groups."""
        for j, group in changes:
            source = self.home[j]
            self.ends[source] -= self.weights[self.degree[source], j]
            self.room[source] += self.tokens[j]
            self.home[j] = group
            self.ends[group] += self.weights[self.degree[group], j]
            self.room[group] -= self.tokens[j]

    def packing(self) -> Packing:
        """The groups as they now are."""
        packing: Packing = [(int(d), []) for d in self.degree]
        for k, group in zip(self.members.tolist(), self.home.tolist(), strict=True):
            packing[group][1].append(k)
        return packing
