"""Softmax attention over a stream that is scattered over a group of ranks.

Legend: B batch, T query tokens on this rank, S key tokens on this rank, H query heads, G key/value
heads, K key dim, V value dim, W ranks.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.layout import SequenceLayout
from seqpar.ops.gather import KeyGather, gather_plan
from seqpar.ops.ring import RingAttention
from seqpar.ops.ring_schedule import (
    RingSchedule,
    most_keys_sent,
    own_schedule,
    ring_schedule,
)
from seqpar.ops.softmax_choice import Call, Strategy, choose
from seqpar.ops.softmax_refusals import refuse
from seqpar.ops.softmax_tiles import Mask
from seqpar.ops.ulysses import (
    HeadsToTokens,
    TokensToHeads,
    expanded,
    head_shares,
    merged_layout,
    subgroup,
)

__all__ = ["softmax_attention"]


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: SequenceLayout,
    group: ProcessGroup | None,
    strategy: Strategy = "auto",
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    key_layout: SequenceLayout | None = None,
    ulysses_degree: int | None = None,
    check: bool = True,
) -> Tensor:
    """softmax(scale q kᵀ) v of every query over the keys of its own document, on every rank.

    Equal to one device that holds the whole stream, forward and in every gradient, for any layout:
    arithmetic and sums over blocks in float32 (float64 for float64), the result in q's dtype.
    Differentiable once. Deterministic if `torch.use_deterministic_algorithms(True)` is on.

    Args:
        q: [B, T, H, K], this rank's part of the stream.
        k: [B, S, G, K]; G divides H (grouped queries). v: [B, S, G, V].
        layout: where each query lives; documents do not see each other.
        group: its ranks, in the layout's order; None for a layout of one rank.
        strategy: how keys or heads travel:
            ring     key/value blocks, each straight from its owner, under the attention of the
                     block before. Any heads, any mask. Memory: two blocks.
            ulysses  all-to-all over heads; needs H >= W.
            usp      ulysses within `ulysses_degree` neighbouring ranks, ring over the rest.
            gather   all keys that this rank sees, at once, then one attention.
            halo     the ring under a window: only the neighbours' nearest tokens travel, under
                     the attention of the rank's own.
            auto     the cheapest by heads, layout and mask; the same on every rank.
        causal: a query sees no later key of its document.
        window: a query sees window keys, itself included, or if not causal window - 1 more ahead.
        scale: a positive number; default K ** -0.5.
        key_layout: where the keys live, if they are another stream (cross-attention): document d
            of the queries sees document d of the keys, all of it.
        ulysses_degree: for usp; divides W. Default: the largest common divisor of W and G, so that
            no key/value head is sent twice.
        check: make sure, by 16 bytes from each rank, that all ranks were called alike and that
            every rank's tensors fit the layout. Without it (when a whole model is known to be
            right) a rank with a wrong shape leaves the others waiting.

    Raises:
        LayoutError: tensors, layouts, mask and strategy that do not fit together, or differ between
            ranks; on every rank.
        MeshError: a group, a degree or heads that do not fit together; on every rank.
        KernelInputError: a device or dtype without a fused attention kernel; on every rank.

    Source: Ring Attention, arXiv 2310.01889; DeepSpeed-Ulysses, arXiv 2309.14509; USP, arXiv
    2405.07719; Ring Self-Attention, arXiv 2105.13120.
    """
    mask = Mask(causal=causal, window=window)
    call = Call.of(q, k, v, layout, key_layout, mask, strategy, ulysses_degree)
    refuse(call, q, k, v, group, scale=scale, check=check)
    chosen, degree = choose(call)
    scale = call.key_dim**-0.5 if scale is None else scale
    if chosen in ("ulysses", "usp"):
        return _trade_heads(q, k, v, call, degree, group, scale)
    if chosen == "gather":
        plan = gather_plan(layout, call.key_layout, comm.group_rank(group), mask)
        k, v = KeyGather.apply(k, v, plan, group)  # type: ignore[no-untyped-call]
        return _attend(q, k, v, own_schedule(plan.tiles, k.shape[1]), None, scale)
    members = tuple(range(layout.world_size))
    schedule = ring_schedule(layout, call.key_layout, comm.group_rank(group), mask, members)
    _make_room(k, v, k.shape[2], (layout, call.key_layout, mask), group)
    return _attend(q, k, v, schedule, group, scale)


def _trade_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: Call,
    degree: int,
    group: ProcessGroup | None,
    scale: float,
) -> Tensor:
    """Ulysses over `degree` neighbours, a ring over the subgroups."""
    rank, size = comm.group_rank(group), call.layout.world_size
    shares = head_shares(call.heads, call.kv_heads, degree)
    place = subgroup(call.layout, degree, rank)
    key_place = subgroup(call.key_layout, degree, rank)
    traded = (q, k, v, (place, key_place), shares, group)
    q, k, v = TokensToHeads.apply(*traded)  # type: ignore[no-untyped-call]
    k, v = (expanded(x, shares.repeats[place.index]) for x in (k, v))
    layouts = merged_layout(call.layout, degree), merged_layout(call.key_layout, degree)
    members = tuple(range(place.index, size, degree))
    schedule = ring_schedule(*layouts, rank // degree, call.mask, members)
    _make_room(k, v, shares.most_key_heads, (*layouts, call.mask), group)
    out = _attend(q, k, v, schedule, group, scale)
    result: Tensor = HeadsToTokens.apply(  # type: ignore[no-untyped-call]
        out, call.heads, place, shares, group
    )
    return result


def _make_room(
    k: Tensor,
    v: Tensor,
    num_heads: int,
    between: tuple[SequenceLayout, SequenceLayout, Mask],
    group: ProcessGroup | None,
) -> None:
    """For the largest block of keys and values that any rank of the group sends."""
    if comm.shares_memory(group):
        bytes_of_key = k.shape[0] * num_heads * (k.shape[3] + v.shape[3]) * k.element_size()
        comm.make_room(group, most_keys_sent(*between) * bytes_of_key)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: RingSchedule,
    group: ProcessGroup | None,
    scale: float,
) -> Tensor:
    out: Tensor = RingAttention.apply(q, k, v, schedule, group, scale)  # type: ignore[no-untyped-call]
    return out
