"""How the tokens of one call are cut into segments: what one program runs through in order.

Legend: S sequences, N tokens of all rows, M segments, H heads.

A sequence that is long beside the others is cut so that every multiprocessor has a program;
nothing is cut that need not be, since each cut asks for the state that enters behind it.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Segments", "cut"]


@dataclass(frozen=True)
class Segments:
    """The cut of one call. All tensors are int32 on the inputs' device, in stream order.

    A pure function of the sequences' bounds; the tables of recent calls are kept, so that the
    layers of a model share them.
    """

    count: int
    num_sequences: int
    num_cut: int
    """Segments that another one of their sequence follows."""
    longest: int
    """Tokens of the longest segment."""
    deepest: int
    """Segments of the sequence that has most."""
    bounds: Tensor
    """[M + 1]: segment i holds rows bounds[i] to bounds[i + 1] of the flattened [B * T]."""
    sequence: Tensor
    """[M]: the sequence that a segment belongs to."""
    first: Tensor
    """[S + 1]: the first segment of each sequence."""
    table: Tensor
    """[M, 8]: what a program needs to know of its segment in one row; longest first, the order in
    which programs start. Segment, its rows' bounds, its sequence, how many segments of that lie
    before and how many behind, the sequence's bounds."""
    with_successor: Tensor
    """[M - S, 8]: rows of segments whose exit state another segment of the sequence needs."""
    with_predecessor: Tensor
    """[M - S, 8]: the same for the gradient of the entry state."""


@lru_cache(maxsize=64)
def cut(bounds: tuple[int, ...], lanes: int, slots: int, chunk: int, device: str) -> Segments:
    """Cut sequences into segments.

    Args:
        bounds: row bounds of the sequences.
        lanes: programs that run through one segment side by side (heads times value tiles).
        slots: programs that the device runs at a time.
        chunk: tokens of a chunk; segments are multiples of it, but for a sequence's last.
        device: where the tables go.
    """
    return _tables(bounds, _segment_tokens(bounds, lanes, slots, chunk), device)


def _segment_tokens(bounds: tuple[int, ...], lanes: int, slots: int, chunk: int) -> int:
    """The segment length that ends soonest.

    Sequences of one length run in waves of `slots` programs; others fill gaps. A cut costs up to
    half a read of the tokens before it, and a little for itself.
    """
    lengths = [stop - start for start, stop in itertools.pairwise(bounds)]
    longest = max(lengths, default=chunk)
    even = len(set(lengths)) <= 1
    best, best_cost = longest, float("inf")
    for pieces in range(1, 4 * slots // lanes + 3):
        tokens = -(-longest // (pieces * chunk)) * chunk
        programs = lanes * sum(-(-length // tokens) for length in lengths)
        waves = -(-programs // slots) if even else programs / slots
        work = lanes * bounds[-1] / min(slots, programs)
        makespan = waves * tokens if even else max(tokens, work + 0.3 * tokens)
        cost = makespan * (1.0 + 0.35 * (1.0 - 1.0 / pieces)) + 2 * chunk * (pieces > 1)
        if cost < best_cost * 0.98:
            best, best_cost = tokens, cost
        if tokens <= 4 * chunk:
            break
    return max(best, chunk)


def _tables(bounds: tuple[int, ...], tokens: int, device: str) -> Segments:
    starts: list[int] = []
    sequence: list[int] = []
    first = [0]
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        starts.extend(range(start, stop, tokens))
        sequence.extend([index] * (len(starts) - len(sequence)))
        first.append(len(starts))
    edges = [*starts, bounds[-1]]
    by_length = sorted(range(len(starts)), key=lambda i: edges[i] - edges[i + 1])
    successor = [i for i in by_length if i + 1 < len(starts) and sequence[i + 1] == sequence[i]]
    predecessor = [i for i in by_length if i > 0 and sequence[i - 1] == sequence[i]]
    rows = [
        (i, edges[i], edges[i + 1], s, i - first[s], first[s + 1] - 1 - i, bounds[s], bounds[s + 1])
        for i, s in enumerate(sequence)
    ]
    tables = [[x for i in part for x in rows[i]] for part in (by_length, successor, predecessor)]
    views = _on_device((edges, sequence, first, *tables), device)
    longest = max((stop - start for start, stop in itertools.pairwise(edges)), default=0)
    deepest = max((stop - start for start, stop in itertools.pairwise(first)), default=0)
    counts = (len(starts), len(bounds) - 1, len(successor), longest, deepest)
    return Segments(*counts, *views[:3], *(view.view(-1, 8) for view in views[3:]))


def _on_device(parts: tuple[list[int], ...], device: str) -> list[Tensor]:
    """The lists as int32 tensors, copied at once; each begins at a multiple of 16 bytes.

    Triton compiles a kernel apart for pointers that are no such multiple: were the lists laid end
    to end, new lengths of documents would ask for new variants, a second each.
    """
    padded = [[*part, *[0] * (-len(part) % 4)] for part in parts]
    table = torch.tensor([x for part in padded for x in part], dtype=torch.int32).to(device)
    rooms = torch.split(table, [len(part) for part in padded])
    return [room[: len(part)] for room, part in zip(rooms, parts, strict=True)]
