"""The most valuable set of sequences for one group: a 0/1 knapsack with time and memory.

Used to price configurations. Branch and bound over sequences in order of value per combined
weight; its upper bound is a fractional knapsack on λ · time + (1-λ) · tokens, which is valid for
every λ in [0, 1]; the search keeps the λ that bounds the root best.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Best", "most_valuable"]

_LAMBDAS = np.linspace(0.0, 1.0, 9)
_EPSILON = 1e-12


class Best(NamedTuple):
    """A set, its value, and a value that no set exceeds."""

    members: list[int]
    value: float
    upper: float


def most_valuable(
    values: NDArray[np.float64],
    time: NDArray[np.float64],
    tokens: NDArray[np.float64],
    *,
    max_nodes: int,
) -> Best:
    """The set of most value with Σ time <= 1 and Σ tokens <= 1 (both as shares of the limit).

    `max_nodes` bounds the search; `upper` stays a true bound if it is reached.
    """
    useful = np.flatnonzero((values > _EPSILON) & (time <= 1) & (tokens <= 1))
    if not len(useful):
        return Best([], 0.0, 0.0)
    values, time, tokens = values[useful], time[useful], tokens[useful]
    bounds = [_fractional(values, lam * time + (1 - lam) * tokens) for lam in _LAMBDAS]
    lam = float(_LAMBDAS[int(np.argmin(bounds))])
    weight = lam * time + (1 - lam) * tokens
    order = np.argsort(-values / np.maximum(weight, 1e-300), kind="stable")
    search = _Search(
        values[order].tolist(), weight[order].tolist(), time[order].tolist(), tokens[order].tolist()
    )
    search.run(max_nodes)
    members = [int(useful[order[i]]) for i in search.best_members]
    return Best(members, search.best, max(search.best, min(search.upper, min(bounds))))


def _fractional(values: NDArray[np.float64], weight: NDArray[np.float64]) -> float:
    order = np.argsort(-values / np.maximum(weight, 1e-300), kind="stable")
    total = np.cumsum(weight[order])
    full = int(np.searchsorted(total, 1.0, side="right"))
    value = float(values[order[:full]].sum())
    if full < len(order):
        left = 1.0 - (float(total[full - 1]) if full else 0.0)
        value += float(values[order[full]]) * left / float(weight[order[full]])
    return value


class _Search:
    """Depth-first branch and bound; take before leave."""

    def __init__(
        self, values: list[float], weight: list[float], time: list[float], tokens: list[float]
    ) -> None:
        self.values, self.weight, self.time, self.tokens = values, weight, time, tokens
        self.best, self.best_members = 0.0, list[int]()
        self.upper = 0.0

    def run(self, max_nodes: int) -> None:
        """Explore up to that many nodes; `upper` covers what was left open."""
        stack: list[tuple[int, float, float, float, float, tuple[int, ...]]] = [
            (0, 0.0, 1.0, 1.0, 1.0, ())
        ]
        nodes = 0
        while stack:
            i, value, left, time, tokens, taken = stack.pop()
            nodes += 1
            if value > self.best:
                self.best, self.best_members = value, list(taken)
            upper = value + self._bound(i, left)
            if upper <= self.best * (1 + 1e-9) + _EPSILON:
                continue
            if nodes > max_nodes:
                self.upper = max(self.upper, upper)
                continue
            while i < len(self.values) and (self.time[i] > time or self.tokens[i] > tokens):
                i += 1
            if i == len(self.values):
                continue
            stack.append((i + 1, value, left, time, tokens, taken))
            stack.append(
                (
                    i + 1,
                    value + self.values[i],
                    left - self.weight[i],
                    time - self.time[i],
                    tokens - self.tokens[i],
                    (*taken, i),
                )
            )
        self.upper = max(self.upper, self.best)

    def _bound(self, start: int, left: float) -> float:
        value = 0.0
        for i in range(start, len(self.values)):
            if self.weight[i] > left:
                return value + self.values[i] * left / self.weight[i]
            left -= self.weight[i]
            value += self.values[i]
        return value
