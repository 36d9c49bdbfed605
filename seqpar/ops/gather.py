"""Gather: fetch the keys and values that this rank's queries see, and no others.

Legend: B batch, S key tokens on this rank, M keys that this rank's queries see, G key/value heads,
D head dim.

One exchange before the attention, one after its backward. What arrives is laid out in stream
order, so that a document's keys are one range and the attention needs few tiles.

    documents   |----- A -----|-- B --|---- C ----|
    rank 0      A A A A A A                             fetches nothing
    rank 1                 A A A B B B                  fetches the tokens of A that rank 0 holds
    rank 2                             C C C C C C      fetches nothing
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.layout import Run, SequenceLayout, Span
from seqpar.ops.softmax_partial import RowSum
from seqpar.ops.softmax_tiles import Mask, Tile, block_tiles, compact_keys, tiles_between
from seqpar.ops.token_ranges import add_ranges, num_tokens, room_for, take_ranges

__all__ = ["GatherPlan", "KeyGather", "gather_plan"]


@dataclass(frozen=True)
class GatherPlan:
    """What one rank sends, receives and lays out.

    Attributes:
        sends: by rank, the local key ranges that it sees of this rank.
        counts: by rank, how many keys this rank sees of it.
        pieces: (rank, start, stop) of what arrived from it, in the order they are laid out.
        tiles: this rank's queries with the keys so laid out.
    """

    sends: tuple[tuple[Span, ...], ...]
    counts: tuple[int, ...]
    pieces: tuple[tuple[int, int, int], ...]
    tiles: tuple[Tile, ...]


@lru_cache(maxsize=64)
def gather_plan(
    layout: SequenceLayout, key_layout: SequenceLayout, rank: int, mask: Mask
) -> GatherPlan:
    """The plan of `rank`; queries lie in `layout`, keys and values in `key_layout`."""
    world = range(layout.world_size)
    sends = [compact_keys(block_tiles(layout, key_layout, r, rank, mask))[0] for r in world]
    wanted = [compact_keys(block_tiles(layout, key_layout, rank, r, mask))[0] for r in world]
    found = sorted(
        (run.start, owner, run)
        for owner in world
        for run in _runs_within(key_layout.runs(owner), wanted[owner])
    )
    runs: list[Run] = []
    offset = 0
    for _, _, run in found:
        if runs and runs[-1].document == run.document and runs[-1].stop == run.start:
            runs[-1] = runs[-1]._replace(stop=run.stop)
        else:
            runs.append(run._replace(local_start=offset))
        offset += run.num_tokens
    return GatherPlan(
        sends=tuple(sends),
        counts=tuple(map(num_tokens, wanted)),
        pieces=tuple((owner, run.local_start, run.local_stop) for _, owner, run in found),
        tiles=tiles_between(layout.runs(rank), runs, mask),
    )


class KeyGather(torch.autograd.Function):
    """This rank's keys and values -> the keys and values that its queries see.

    |          | reads               | gives              | to and from each other rank
    |----------|---------------------|--------------------|------------------------------
    | forward  | k, v [B,S,G,D]      | k, v [B,M,G,D]     | the k and v that it sees
    | backward | dk, dv [B,M,G,D]    | dk, dv [B,S,G,D]   | back their gradients
    """

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, plan: GatherPlan, group: ProcessGroup | None
    ) -> tuple[Tensor, ...]:
        ctx.held, ctx.plan, ctx.group = k.shape[1], plan, group
        ctx.traffic = comm.current_traffic()
        return tuple(_gather_keys((k, v), plan, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with comm.count_into(ctx.traffic):
            back = _scatter_sums(grads, ctx.held, ctx.plan, ctx.group)
        return (*back, None, None)


def _gather_keys(
    tensors: Sequence[Tensor], plan: GatherPlan, group: ProcessGroup | None
) -> list[Tensor]:
    sends, recvs = [], []
    for x in tensors:
        for rank, (spans, count) in enumerate(zip(plan.sends, plan.counts, strict=True)):
            sends.append((rank, take_ranges(x, spans)))
            recvs.append((rank, room_for(count, x)))
    arrived = comm.exchange(sends, recvs, group).wait()
    gathered = []
    for i, x in enumerate(tensors):
        blocks = arrived[i * len(plan.counts) : (i + 1) * len(plan.counts)]
        pieces = [blocks[rank][:, start:stop] for rank, start, stop in plan.pieces]
        gathered.append(torch.cat([x[:, :0], *pieces], 1))
    return gathered


def _scatter_sums(
    grads: Sequence[Tensor], held: int, plan: GatherPlan, group: ProcessGroup | None
) -> list[Tensor]:
    """The transpose of `_gather_keys`: each gradient back to its key's owner, and summed there."""
    sends, recvs = [], []
    for x in grads:
        for rank, block in enumerate(_by_owner(x, plan)):
            sends.append((rank, block))
            recvs.append((rank, room_for(num_tokens(plan.sends[rank]), x)))
    arrived = comm.exchange(sends, recvs, group).wait()
    totals = []
    for i, x in enumerate(grads):
        total = RowSum(room_for(held, x))
        for rank, spans in enumerate(plan.sends):
            add_ranges(total, arrived[i * len(plan.sends) + rank], spans)
        totals.append(total.result())
    return totals


def _by_owner(x: Tensor, plan: GatherPlan) -> list[Tensor]:
    """[B, M, G, D] as laid out -> by rank, what came from it in the order in which it came."""
    blocks = [room_for(count, x) for count in plan.counts]
    offset = 0
    for rank, start, stop in plan.pieces:
        blocks[rank][:, start:stop] = x[:, offset : offset + stop - start]
        offset += stop - start
    return blocks


def _runs_within(runs: Sequence[Run], ranges: Sequence[Span]) -> list[Run]:
    """The parts of the runs inside local ranges; local_start counts within the ranges."""
    found = []
    offset = 0
    for span in ranges:
        for run in runs:
            common = span.intersect(Span(run.local_start, run.local_stop))
            if common.num_tokens:
                start = run.start + common.start - run.local_start
                local = offset + common.start - span.start
                found.append(Run(run.document, start, start + common.num_tokens, local))
        offset += span.num_tokens
    return found
