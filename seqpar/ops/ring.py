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
back to their owner.

Source: Liu, Zaharia and Abbeel, Ring Attention, arXiv 2310.01889; Li et al., arXiv 2105.13120.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from seqpar import comm
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
    grads, block, returning = Gradients.of(x.q, x.k, x.v), kept, _Returning.nothing()
    for step, following in schedule.with_following(schedule.backward):
        arriving = _post_block(x.k, x.v, following, group)  # post
        sums = grads if step.is_own else grads.for_keys(*block)
        attend_backward(sums, x.with_keys(*block), step.tiles, scale=scale)  # compute
        if following is not None:
            returning.add_to(grads)  # wait: what others computed for this rank's keys
            returning = _Returning.post(sums, x.k, x.v, step, group, is_last=following.is_own)
            block = _block(arriving)  # wait, rotate
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
    """Gradients of this rank's keys and values, on their way from the rank that computed them."""

    def __init__(self, step: Step | None, pending: comm.Pending[list[Tensor]]) -> None:
        self.step, self.pending = step, pending

    @classmethod
    def nothing(cls) -> _Returning:
        return cls(None, comm.Pending((), list))

    @classmethod
    def post(
        cls,
        sums: Gradients,
        k: Tensor,
        v: Tensor,
        step: Step,
        group: ProcessGroup | None,
        *,
        is_last: bool,
    ) -> _Returning:
        """Send the block's gradients to its owner; receive those of the keys sent before.

        The last ones are summed at once, so they may be lent.
        """
        num_sent = num_tokens(step.send_keys)
        sends = [(step.recv_from, part.result()) for part in (sums.dk, sums.dv)]
        rooms = [torch.Size((x.shape[0], num_sent, *x.shape[2:])) for x in (k, v)]
        if is_last:
            recvs = [(step.send_to, room) for room in rooms]
            return cls(step, comm.exchange_lent(sends, recvs, k, group))
        landings = [(step.send_to, k.new_empty(room)) for room in rooms]
        return cls(step, comm.exchange(sends, landings, group, beside_work=True))

    def add_to(self, grads: Gradients) -> None:
        self._add(grads, self.pending.wait())

    def end(self, grads: Gradients) -> tuple[Tensor, Tensor]:
        """dk and dv, complete."""

        def complete(arrived: list[Tensor]) -> tuple[Tensor, Tensor]:
            self._add(grads, arrived)
            return grads.dk.result(), grads.dv.result()

        return self.pending.read(complete)

    def _add(self, grads: Gradients, arrived: list[Tensor]) -> None:
        if self.step is not None:
            for total, part in zip((grads.dk, grads.dv), arrived, strict=True):
                add_ranges(total, part, self.step.send_keys, is_lent=self.pending.is_lent)
