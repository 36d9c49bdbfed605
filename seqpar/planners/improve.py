"""Local search on one micro-batch: move or swap sequences out of the slowest group."""

from __future__ import annotations

import numpy as np

from seqpar.planners.batch import SortedBatch
from seqpar.planners.packing import Packing

__all__ = ["improve"]


def improve(batch: SortedBatch, packing: Packing, *, max_steps: int) -> Packing:
    """Shorten the slowest group by the best move or swap until none helps.

    Each step looks at every sequence of the slowest group against every group (move) and every
    sequence outside it (swap), memory respected, and takes what leaves the smaller maximum of the
    two groups touched.
    """
    lines = batch.degree_lines
    members = [k for _, group in packing for k in group]
    if len(packing) < 2:
        return packing
    ks = np.asarray(members)
    tokens = batch.token_array[ks]
    weights = batch.weight_array[:, ks]
    degree = np.asarray([d for d, _ in packing])
    home = np.repeat(np.arange(len(packing)), [len(group) for _, group in packing])
    capacity = np.asarray([lines[d].capacity for d in degree], dtype=np.float64)
    ends = np.asarray([lines[d].fixed for d in degree])
    np.add.at(ends, home, weights[degree[home], np.arange(len(ks))])
    room = capacity.copy()
    np.subtract.at(room, home, tokens)
    for _ in range(max_steps):
        slow = int(np.argmax(ends))
        inside = np.flatnonzero(home == slow)
        outside = np.flatnonzero(home != slow)
        out_ms, out_tokens = weights[degree[slow], inside], tokens[inside]
        limit = ends[slow] * (1 - 1e-12)
        # moves [inside, groups]
        there = ends[None, :] + weights[np.ix_(degree, inside)].T
        after = np.maximum(there, (ends[slow] - out_ms)[:, None])
        after[:, slow] = np.inf
        after[out_tokens[:, None] > room[None, :]] = np.inf
        move = int(np.argmin(after))
        best, swap = float(after.flat[move]), -1
        if len(outside):
            # swaps [inside, outside]
            other = home[outside]
            gone = weights[degree[other], outside]
            there = (ends[other] - gone)[None, :] + weights[np.ix_(degree[other], inside)].T
            here = (ends[slow] - out_ms)[:, None] + weights[degree[slow], outside][None, :]
            after = np.maximum(there, here)
            delta = out_tokens[:, None] - tokens[outside][None, :]
            after[(delta > room[other][None, :]) | (-delta > room[slow])] = np.inf
            found = int(np.argmin(after))
            if after.flat[found] < best:
                best, swap = float(after.flat[found]), found
        if not best < limit:
            break
        if swap < 0:
            i, group = divmod(move, len(ends))
            changes = [(inside[i], group)]
        else:
            i, j = divmod(swap, len(outside))
            changes = [(inside[i], int(home[outside[j]])), (outside[j], slow)]
        for k, group in changes:
            source = home[k]
            ends[source] -= weights[degree[source], k]
            room[source] += tokens[k]
            home[k] = group
            ends[group] += weights[degree[group], k]
            room[group] -= tokens[k]
    groups: Packing = [(int(d), []) for d in degree]
    for k, group in zip(members, home.tolist(), strict=True):
        groups[group][1].append(k)
    return groups
