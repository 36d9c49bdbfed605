"""Micro-batches: where to cut the sequences, sorted by length, so that the sum of makespans is low.

FlexSP cuts to even out tokens. Here a dynamic programme cuts to minimise the sum of *estimated
makespans*: the fixed term plus the larger of (device time of the piece) / devices and the least
time of its longest sequence.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from seqpar.planners.batch import SortedBatch

__all__ = ["best_cuts", "blaster_cuts", "likely_counts", "safe_packings"]

MAX_CUT_POSITIONS = 128


def best_cuts(batch: SortedBatch, *, fill: float) -> list[int] | None:
    """Bounds (from 0 to K) that minimise the sum of estimated makespans.

    `fill` is the share of the cluster's token capacity that a micro-batch may use: below 1 it
    leaves room for what cannot be divided. None if the longest sequence alone exceeds it.
    """
    positions = _positions(len(batch.tokens))
    estimate = _estimates(batch, positions, fill)
    count = len(positions)
    best = np.full(count, np.inf)
    best[0] = 0.0
    source = np.zeros(count, dtype=np.int64)
    for stop in range(1, count):
        total = best[:stop] + estimate[:stop, stop]
        source[stop] = int(np.argmin(total))
        best[stop] = total[source[stop]]
    if not np.isfinite(best[-1]):
        return None
    cuts, at = [], count - 1
    while at > 0:
        cuts.append(int(positions[at]))
        at = int(source[at])
    return [0, *reversed(cuts)]


def blaster_cuts(batch: SortedBatch, count: int) -> list[int]:
    """FlexSP's blaster: bounds of `count` contiguous pieces with the least largest token total.

    arXiv 2412.01523, section 4; by bisection over that total instead of its dynamic programme.
    """
    low, high = batch.tokens[0], sum(batch.tokens)
    while low < high:
        middle = (low + high) // 2
        if len(_pieces(batch.tokens, middle)) - 1 <= count:
            high = middle
        else:
            low = middle + 1
    return _pieces(batch.tokens, low)


def _pieces(tokens: tuple[int, ...], limit: int) -> list[int]:
    """Bounds of contiguous pieces of at most `limit` tokens, each as long as it can be."""
    bounds, total = [0], 0
    for k, size in enumerate(tokens):
        if total + size > limit and k > bounds[-1]:
            bounds.append(k)
            total = 0
        total += size
    return [*bounds, len(tokens)]


def likely_counts(batch: SortedBatch) -> list[int]:
    """Numbers of micro-batches worth trying, the likeliest first."""
    fewest = batch.least_micro_batches
    cuts = best_cuts(batch, fill=1.0)
    estimated = len(cuts) - 1 if cuts else fewest
    counts = [max(estimated, fewest), fewest, fewest + 1, estimated + 1]
    return list(dict.fromkeys(counts))


def safe_packings(batch: SortedBatch) -> list[list[tuple[int, list[int]]]]:
    """Micro-batches that always fit: groups of the largest degree, filled one after the other."""
    d = len(batch.degree_lines) - 1
    line = batch.degree_lines[d]
    a_batch = max(1, batch.devices // line.degree)
    groups: list[list[int]] = []
    room = 0
    for k, tokens in enumerate(batch.tokens):
        if not groups or tokens > room:
            groups.append([])
            room = line.capacity
        groups[-1].append(k)
        room -= tokens
    packed = [(d, group) for group in groups]
    return [packed[i : i + a_batch] for i in range(0, len(packed), a_batch)]


def _positions(count: int) -> NDArray[np.int64]:
    """Where a cut may be: everywhere for small batches, every few sequences for large ones."""
    step = -(-count // MAX_CUT_POSITIONS)
    positions: NDArray[np.int64] = np.unique(np.append(np.arange(0, count, step), count))
    return positions


def _estimates(
    batch: SortedBatch, positions: NDArray[np.int64], fill: float
) -> NDArray[np.float64]:
    """[i, j]: estimated makespan of sequences positions[i] to positions[j]; inf if too large."""
    fixed = float(batch.fixed_array.min())
    device_ms = batch.least(batch.weight_array * batch.degree_array[:, None])
    least_end = batch.least(batch.weight_array + batch.fixed_array[:, None])
    work = np.concatenate([[0.0], np.cumsum(device_ms)])[positions]
    tokens = np.concatenate([[0.0], np.cumsum(batch.token_array)])[positions]
    first_end = least_end[np.minimum(positions, len(batch.tokens) - 1)]
    shared: NDArray[np.float64] = fixed + (work[None, :] - work[:, None]) / batch.devices
    estimate: NDArray[np.float64] = np.maximum(shared, first_end[:, None])
    limit = fill * batch.devices * batch.device_token_capacity
    estimate[tokens[None, :] - tokens[:, None] > limit] = np.inf
    return estimate
