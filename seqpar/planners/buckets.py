"""Length buckets that round up least: FlexSP's dynamic programme (arXiv 2412.01523, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

__all__ = ["optimal_buckets"]


def optimal_buckets(lengths: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
    """(longest length, indices) of at most `count` buckets, shortest first.

    They minimise the tokens added when each length is rounded up to its bucket's longest.
    """
    order = sorted(range(len(lengths)), key=lambda index: (lengths[index], index))
    rising = np.asarray([lengths[index] for index in order], dtype=np.float64)
    total = len(rising)
    count = min(count, total)
    before = np.concatenate([[0.0], np.cumsum(rising)])
    stop = np.arange(1, total + 1)
    start = np.arange(total)
    # added[j, k-1]: tokens added by one bucket of sequences j..k-1
    added = rising[None, :] * (stop[None, :] - start[:, None]) - (
        before[None, 1:] - before[:total, None]
    )
    added[start[:, None] >= stop[None, :]] = np.inf
    best = np.concatenate([[0.0], np.full(total, np.inf)])
    sources = []
    for _ in range(count):
        through = best[:total, None] + added
        source = through.argmin(axis=0)
        best = np.concatenate([[np.inf], through[source, np.arange(total)]])
        sources.append(source)
    bounds = [total]
    for source in reversed(sources):
        bounds.append(int(source[bounds[-1] - 1]))
    pieces = pairwise(reversed(bounds))
    return [(int(rising[b - 1]), [order[i] for i in range(a, b)]) for a, b in pieces]
