"""Ring attention: key/value blocks come by one after the other while this rank's queries stay.

Legend: B batch, T tokens on this rank, H query heads, G key/value heads, K key dim, V value dim,
W ranks.

At step t a rank works on the block of rank (rank + t) mod W. Every block comes straight from its
owner, and only the keys that the mask lets this rank see: a relay from neighbour to neighbour would
have to carry what the neighbour does not need. The transfer for step t + 1 is posted before the
attention of step t. A block pair that the mask empties is neither computed nor sent.

    step            0               1               2
    rank 0     own  k0 v0  |  from 1  k1 v1  |  from 2  k2 v2
    rank 1     own  k1 v1  |  from 2  k2 v2  |  from 0  k0 v0
    rank 2     own  k2 v2  |  from 0  k0 v0  |  from 1  k1 v1

Forward keeps the last block, that of the left neighbour. Backward begins with it, so that there is
work while the next one travels, and ends with the own block, under which the last gradients travel
back to their owner: where that block is long, under its last heads; see `ring_late`.

Source: Liu, Zaharia and Abbeel, Ring Attention, arXiv 2310.01889; Li et al., arXiv 2105.13120.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.layout import Span
from seqpar.ops.ring_late import heads_before_last_message
from seqpar.ops.ring_schedule import RingSchedule, Step
from seqpar.ops.softmax_local import Gradients, attend, attend_backward
from seqpar.ops.softmax_operands import Operands
from seqpar.ops.softmax_partial import PartialOutput
from seqpar.ops.token_ranges import add_ranges, num_tokens, room_for, take_ranges

__all__ = ["Block", "RingAttention", "ring_backward", "ring_forward"]

Block = tuple[Tensor, Tensor]
"""Keys [B, S, G, K] and values [B, S, G, V] of one rank, or what another rank sees of them."""


def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: RingSchedule,
    group: ProcessGroup | None,
    scale: float,
) -> tuple[Tensor, Tensor, Block]:
    """out [B, T, H, V] in q's dtype and lse [B, T, H] of this rank's queries over all keys.

    Also the last block, with which `ring_backward` begins.
    """
    merged = PartialOutput(q, v.shape[-1])
    block = k, v
    for step, following in schedule.with_following(schedule.forward):
        arriving = _post_block(k, v, following, group)  # post
        attend(merged, q, *block, step.tiles, scale=scale)  # compute
        if following is not None:
            block = _block(arriving)  # wait, rotate
    return (*merged.result(), block)


def ring_backward(
    x: Operands, kept: Block, schedule: RingSchedule, group: ProcessGroup | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's tokens, from the out and lse merged over all keys."""
    grads, block, returning = Gradients.of(x.q, x.k, x.v), kept, _Returning()
    *remote, own = schedule.backward
    for step, following in zip(remote, schedule.backward[1:], strict=True):
        arriving = _post_block(x.k, x.v, following, group)  # post
        sums = grads.for_keys(*block)
        attend_backward(sums, x.with_keys(*block), step.tiles, scale=scale)  # compute
        returning.add_to(grads)  # wait: what others computed for this rank's keys
        returning = _Returning.of(sums, x.k, x.v, step)
        if not following.is_own:
            returning.post(x.k, group)
        block = _block(arriving)  # wait, rotate
    first = heads_before_last_message(x, own.tiles, returning.num_elements)
    if first:
        attend_backward(grads, x.of_heads(0, first), own.tiles, scale=scale)
    returning.post(x.k, group, is_last=True)
    rest = x.of_heads(first, x.k.shape[2])
    attend_backward(grads, rest, own.tiles, scale=scale, first_head=first)
    dq = grads.dq.result()  # complete, whenever the last gradients arrive
    return dq, *returning.end(grads)


class RingAttention(torch.autograd.Function):
    """Ring attention of one rank's queries.

    |          | reads                           | gives         | to and from each other rank
    |----------|---------------------------------|---------------|----------------------------
    | forward  | q [B,T,H,K], k [B,S,G,K],       | out [B,T,H,V] | the k and v that it sees
    |          | v [B,S,G,V]                     |               |
    | backward | dout and the saved q, k, v,     | dq, dk, dv    | the k and v that it sees,
    |          | out, lse [B,T,H], last block    |               | without the last block's;
    |          |                                 |               | and back their dk and dv

    A causal zigzag sends half of k and v or all of it at each of W - 1 steps. Live beside the
    rank's own tensors: two blocks of k and v, and in backward two blocks of dk and dv; from forward
    to backward one block of k and v.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        schedule: RingSchedule,
        group: ProcessGroup | None,
        scale: float,
    ) -> Tensor:
        out, lse, kept = ring_forward(q, k, v, schedule, group, scale)
        ctx.save_for_backward(q, k, v, out, lse, *kept)
        ctx.schedule, ctx.group, ctx.scale = schedule, group, scale
        ctx.traffic = comm.current_traffic()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        with comm.count_into(ctx.traffic):
            q, k, v, out, lse, k_kept, v_kept = ctx.saved_tensors
            operands = Operands(dout, q, k, v, out, lse)
            grads = ring_backward(operands, (k_kept, v_kept), ctx.schedule, ctx.group, ctx.scale)
        return (*grads, None, None, None)


def _post_block(
    k: Tensor, v: Tensor, step: Step | None, group: ProcessGroup | None
) -> comm.Pending[list[Tensor]]:
    """Under way: the block that `step` works on."""
    if step is None or step.is_own:
        return comm.Pending((), lambda: [k, v])
    sends = [(step.send_to, take_ranges(x, step.send_keys)) for x in (k, v)]
    recvs = [(step.recv_from, room_for(step.num_recv, x)) for x in (k, v)]
    return comm.exchange(sends, recvs, group, beside_work=True, head_start=True)


def _block(arriving: comm.Pending[list[Tensor]]) -> Block:
    k, v = arriving.wait()
    return k, v


class _Returning:
    """A block's gradients on their way to its owner, and those that come of this rank's keys.

    Args:
        keys: whose gradients come. sends, recvs: dk and dv, as (rank, tensor) and (rank, shape).
    """

    def __init__(
        self,
        keys: tuple[Span, ...] = (),
        sends: Sequence[tuple[int, Tensor]] = (),
        recvs: Sequence[tuple[int, torch.Size]] = (),
    ) -> None:
        self._keys, self._sends, self._recvs = keys, sends, recvs
        self._pending: comm.Pending[list[Tensor]] = comm.Pending((), list)

    @classmethod
    def of(cls, sums: Gradients, k: Tensor, v: Tensor, step: Step) -> _Returning:
        """The block's gradients to its owner; to this rank those of the keys it sent before."""
        num_sent = num_tokens(step.send_keys)
        rooms = [torch.Size((x.shape[0], num_sent, *x.shape[2:])) for x in (k, v)]
        sends = [(step.recv_from, part.result()) for part in (sums.dk, sums.dv)]
        return cls(step.send_keys, sends, [(step.send_to, room) for room in rooms])

    @property
    def num_elements(self) -> int:
        """Of what is sent or of what comes, whichever is more."""
        sent = sum(x.numel() for _, x in self._sends)
        return max(sent, sum(room.numel() for _, room in self._recvs))

    def post(self, like: Tensor, group: ProcessGroup | None, *, is_last: bool = False) -> None:
        """Post both; the last that come are summed at once, so they may be lent."""
        if is_last:
            self._pending = comm.exchange_lent(self._sends, self._recvs, like, group)
        else:
            landings = [(peer, like.new_empty(room)) for peer, room in self._recvs]
            self._pending = comm.exchange(self._sends, landings, group, beside_work=True)
        self._sends = ()

    def add_to(self, grads: Gradients) -> None:
        self._add(grads, self._pending.wait())

    def end(self, grads: Gradients) -> tuple[Tensor, Tensor]:
        """dk and dv, complete."""

        def complete(arrived: list[Tensor]) -> tuple[Tensor, Tensor]:
            self._add(grads, arrived)
            return grads.dk.result(), grads.dv.result()

        return self._pending.read(complete)

    def _add(self, grads: Gradients, arrived: list[Tensor]) -> None:
        for total, part in zip((grads.dk, grads.dv), arrived, strict=False):
            add_ranges(total, part, self._keys, is_lent=self._pending.is_lent)
