"""Ulysses: trade tokens for heads, so that a rank attends over many tokens with few heads.

Legend: B batch, T tokens on this rank, S tokens of the rank's subgroup, H query heads, G key/value
heads, U degree, D head dim.

A group of W ranks is cut into W / U subgroups of U neighbours. Within one, rank u sends to each
member that member's share of the heads and receives its own share of all the subgroup's tokens:

                 heads 0 1 2 3                       heads 0 1 | 2 3
    rank 0       a a a a                 rank 0            a a
    rank 1       b b b b        ->                         b b
                                         rank 1                  a a
                                                                 b b

Query heads are dealt out as evenly as they go, in order; each share takes along the key/value heads
that it reads, unexpanded. With fewer key/value heads than ranks, or shares that cut a head group, a
key/value head goes to several ranks, and its gradients are summed where its tokens live.

Source: Jacobs et al., DeepSpeed-Ulysses, arXiv 2309.14509; Fang and Zhao, USP, arXiv 2405.07719.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_partial import RowSum

__all__ = [
    "HeadShares",
    "HeadsToTokens",
    "Subgroup",
    "TokensToHeads",
    "expanded",
    "head_shares",
    "merged_layout",
    "subgroup",
]


@dataclass(frozen=True)
class Subgroup:
    """The U ranks that trade heads, and how their tokens interleave in the stream.

    Attributes:
        members: group ranks. index: this rank's place among them.
        tokens: how many tokens each member holds.
        pieces: (member, start, stop) of local tokens, in stream order.
    """

    members: tuple[int, ...]
    index: int
    tokens: tuple[int, ...]
    pieces: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class HeadShares:
    """Which heads each member works on.

    Attributes:
        queries, keys: (start, stop) of query and of key/value heads, by member.
        repeats: by member, how often each of its key/value heads must be repeated, one after the
            other, to line up with its query heads; None if equal groups line up by themselves.
    """

    queries: tuple[tuple[int, int], ...]
    keys: tuple[tuple[int, int], ...]
    repeats: tuple[tuple[int, ...] | None, ...]

    @property
    def most_key_heads(self) -> int:
        """The most key/value heads that a member has, after repetition."""
        pairs = zip(self.keys, self.repeats, strict=True)
        return max(b - a if counts is None else sum(counts) for (a, b), counts in pairs)


@lru_cache(maxsize=64)
def subgroup(layout: SequenceLayout, degree: int, rank: int) -> Subgroup:
    """The subgroup of `rank` when neighbours trade heads `degree` by `degree`."""
    first = rank // degree * degree
    members = tuple(range(first, first + degree))
    spans = sorted(
        (span, index, offset)
        for index, member in enumerate(members)
        for span, offset in zip(layout.spans[member], layout.local_offsets(member), strict=True)
    )
    return Subgroup(
        members=members,
        index=rank - first,
        tokens=tuple(layout.tokens_on(member) for member in members),
        pieces=tuple((index, offset, offset + span.num_tokens) for span, index, offset in spans),
    )


@lru_cache(maxsize=64)
def merged_layout(layout: SequenceLayout, degree: int) -> SequenceLayout:
    """The layout whose ranks are the subgroups."""
    spans = [
        sorted(span for rank in range(first, first + degree) for span in layout.spans[rank])
        for first in range(0, layout.world_size, degree)
    ]
    return SequenceLayout(layout.cu_seqlens, tuple(tuple(of_group) for of_group in spans))


@lru_cache(maxsize=64)
def head_shares(num_heads: int, kv_heads: int, degree: int) -> HeadShares:
    """Deal query heads out to `degree` ranks, and with them the key/value heads they read."""
    per_group = num_heads // kv_heads
    cuts = [num_heads * i // degree for i in range(degree + 1)]
    queries, keys, repeats = [], [], []
    for start, stop in itertools.pairwise(cuts):
        reads = [head // per_group for head in range(start, stop)]
        queries.append((start, stop))
        keys.append((reads[0], reads[-1] + 1))
        counts = tuple(reads.count(head) for head in range(reads[0], reads[-1] + 1))
        repeats.append(None if len(set(counts)) == 1 else counts)
    return HeadShares(tuple(queries), tuple(keys), tuple(repeats))


def expanded(x: Tensor, repeats: tuple[int, ...] | None) -> Tensor:
    """[B, S, g, D] with key/value head i repeated repeats[i] times; x itself for None."""
    if repeats is None:
        return x
    parts = [x[:, :, i : i + 1].expand(-1, -1, count, -1) for i, count in enumerate(repeats)]
    return torch.cat(parts, 2)


class TokensToHeads(torch.autograd.Function):
    """All heads of this rank's tokens -> this rank's heads of the subgroup's tokens.

    |          | reads                          | gives                 | sends to each member
    |----------|--------------------------------|-----------------------|----------------------
    | forward  | q [B,T,H,D], k, v [B,T,G,D]    | [B,S,h,D], [B,S,g,D]  | its heads of q, k, v
    | backward | dq [B,S,h,D], dk, dv [B,S,g,D] | dq, dk, dv as q, k, v | its tokens' gradients
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        places: tuple[Subgroup, Subgroup],
        shares: HeadShares,
        group: ProcessGroup | None,
    ) -> tuple[Tensor, ...]:
        ctx.num_heads = [x.shape[2] for x in (q, k, v)]
        ctx.places, ctx.shares, ctx.group = places, shares, group
        ctx.traffic = comm.current_traffic()
        return tuple(_to_heads([q, k, v], places, shares, group))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with comm.count_into(ctx.traffic):
            back = _to_tokens(list(grads), ctx.num_heads, ctx.places, ctx.shares, ctx.group)
        return (*back, None, None, None)


class HeadsToTokens(torch.autograd.Function):
    """This rank's heads of the subgroup's tokens -> all heads of this rank's tokens.

    |          | reads          | gives          | sends to each member
    |----------|----------------|----------------|---------------------------------------
    | forward  | out [B,S,h,V]  | out [B,T,H,V]  | its tokens, this rank's heads
    | backward | dout [B,T,H,V] | dout [B,S,h,V] | its heads, this rank's tokens
    """

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        num_heads: int,
        place: Subgroup,
        shares: HeadShares,
        group: ProcessGroup | None,
    ) -> Tensor:
        ctx.places, ctx.shares, ctx.group = (place, place), shares, group
        ctx.traffic = comm.current_traffic()
        return _to_tokens([out], [num_heads], ctx.places, shares, group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        with comm.count_into(ctx.traffic):
            back = _to_heads([dout], ctx.places, ctx.shares, ctx.group)
        return (*back, None, None, None, None)


def _to_heads(
    tensors: Sequence[Tensor],
    places: tuple[Subgroup, Subgroup],
    shares: HeadShares,
    group: ProcessGroup | None,
) -> list[Tensor]:
    """A query-like tensor and any key/value ones, [B, T, heads, D] -> [B, S, share, D]."""
    sends, recvs = [], []
    for x, place, heads in _dealt(tensors, places, shares):
        width = heads[place.index][1] - heads[place.index][0]
        for member, (start, stop), count in zip(place.members, heads, place.tokens, strict=True):
            sends.append((member, x[:, :, start:stop]))
            recvs.append((member, x.new_empty(x.shape[0], count, width, x.shape[3])))
    arrived = comm.exchange(sends, recvs, group).wait()
    merged = []
    for i, (_, place, _) in enumerate(_dealt(tensors, places, shares)):
        blocks = arrived[i * len(place.members) : (i + 1) * len(place.members)]
        pieces = [blocks[member][:, start:stop] for member, start, stop in place.pieces]
        merged.append(torch.cat([blocks[0][:, :0], *pieces], 1))
    return merged


def _to_tokens(
    tensors: Sequence[Tensor],
    num_heads: Sequence[int],
    places: tuple[Subgroup, Subgroup],
    shares: HeadShares,
    group: ProcessGroup | None,
) -> list[Tensor]:
    """The transpose of `_to_heads`: [B, S, share, D] -> [B, T, heads, D], shared heads summed."""
    sends, recvs = [], []
    for x, place, heads in _dealt(tensors, places, shares):
        by_member = _by_member(x, place)
        for member, (start, stop), block in zip(place.members, heads, by_member, strict=True):
            shape = (x.shape[0], place.tokens[place.index], stop - start, x.shape[3])
            sends.append((member, block))
            recvs.append((member, x.new_empty(shape)))
    arrived = comm.exchange(sends, recvs, group).wait()
    totals = []
    for i, (x, place, heads) in enumerate(_dealt(tensors, places, shares)):
        blocks = arrived[i * len(place.members) : (i + 1) * len(place.members)]
        like = x.new_empty(x.shape[0], place.tokens[place.index], num_heads[i], x.shape[3])
        total = RowSum(like)
        for (start, _), block in zip(heads, blocks, strict=True):
            total.add(block, head_start=start)
        totals.append(total.result())
    return totals


def _dealt(
    tensors: Sequence[Tensor], places: tuple[Subgroup, Subgroup], shares: HeadShares
) -> Iterator[tuple[Tensor, Subgroup, tuple[tuple[int, int], ...]]]:
    """Each tensor, its place, its heads by member: the first is query-like, the others are not."""
    for i, x in enumerate(tensors):
        yield x, places[i > 0], shares.keys if i else shares.queries


def _by_member(x: Tensor, place: Subgroup) -> list[Tensor]:
    """[B, S, h, D] in stream order -> each member's tokens in its local order."""
    parts: list[list[Tensor]] = [[] for _ in place.members]
    offset = 0
    for member, start, stop in place.pieces:  # a member's pieces come in its local order
        parts[member].append(x[:, offset : offset + stop - start])
        offset += stop - start
    return [of[0] if len(of) == 1 else torch.cat([x[:, :0], *of], 1) for of in parts]
