"""Ring attention: key/value blocks come by one after the other while this rank's queries stay.

Legend: B batch, T tokens on this rank, H query heads, G key/value heads, K key dim, V value dim,
W ranks.

At step t a rank works on the block of rank (rank - t) mod W. Every block comes straight from its
owner, and only the keys that the mask lets this rank see: a relay from neighbour to neighbour would
have to carry what the neighbour does not need. The transfer for step t + 1 is posted before the
attention of step t. A block pair that the mask empties is neither computed nor sent.

    step            0               1               2
    rank 0     own  k0 v0  |  from 2  k2 v2  |  from 1  k1 v1
    rank 1     own  k1 v1  |  from 0  k0 v0  |  from 2  k2 v2
    rank 2     own  k2 v2  |  from 1  k1 v1  |  from 0  k0 v0

In backward the gradients of a block go straight back to its owner while the next block is worked
on; half of the own heads are kept for the end, so that the last ones travel under work too.

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
from seqpar.ops.ring_schedule import RingSchedule, Step
from seqpar.ops.softmax_local import Gradients, attend, attend_backward
from seqpar.ops.softmax_partial import PartialOutput

__all__ = ["RingAttention", "ring_backward", "ring_forward"]


def ring_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    schedule: RingSchedule,
    group: ProcessGroup | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """out [B, T, H, V] in q's dtype and lse [B, T, H] of this rank's queries over all keys."""
    merged = PartialOutput(q, v.shape[-1])
    k_block, v_block = k, v
    for step, following in schedule.with_following(schedule.forward):
        arriving = _post_block(k, v, following, group)  # post
        attend(merged, q, k_block, v_block, step.tiles, scale=scale)  # compute
        k_block, v_block = arriving.wait()  # wait, rotate
    return merged.result()


def ring_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    schedule: RingSchedule,
    group: ProcessGroup | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of this rank's tokens, from the out and lse merged over all keys."""
    grads = Gradients.of(q, k, v)
    k_block, v_block = k, v
    returning = _Returning.nothing()
    for step, following in schedule.with_following(schedule.backward):
        arriving = _post_block(k, v, following, group)  # post
        sums = grads if step.is_own else grads.for_keys(k_block, v_block)
        _attend_share(sums, dout, q, k_block, v_block, out, lse, step, scale)  # compute
        returning.add_to(grads)  # wait: what others computed for this rank's keys
        returning = _Returning.post(sums, k, v, step, group)
        k_block, v_block = arriving.wait()  # wait, rotate
    returning.add_to(grads)
    return grads.dq.result(), grads.dk.result(), grads.dv.result()


class RingAttention(torch.autograd.Function):
    """Ring attention of one rank's queries.

    |          | reads                           | gives         | to and from each other rank
    |----------|---------------------------------|---------------|----------------------------
    | forward  | q [B,T,H,K], k [B,S,G,K],       | out [B,T,H,V] | the k and v that it sees
    |          | v [B,S,G,V]                     |               |
    | backward | dout and the saved q, k, v,     | dq, dk, dv    | the k and v that it sees,
    |          | out, lse [B,T,H]                |               | and back their dk and dv

    A causal zigzag sends half of k and v or all of it at each of W - 1 steps. Live beside the
    rank's own tensors: two blocks of k and v, and in backward two blocks of dk and dv.
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
        out, lse = ring_forward(q, k, v, schedule, group, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.schedule, ctx.group, ctx.scale = schedule, group, scale
        ctx.traffic = comm.current_traffic()
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        with comm.count_into(ctx.traffic):
            q, k, v, out, lse = ctx.saved_tensors
            grads = ring_backward(dout, q, k, v, out, lse, ctx.schedule, ctx.group, ctx.scale)
        return (*grads, None, None, None)


def _post_block(
    k: Tensor, v: Tensor, step: Step | None, group: ProcessGroup | None
) -> comm.Pending[list[Tensor]]:
    """Under way: the keys and values of the block that `step` works on."""
    if step is None or step.is_own:
        return comm.Pending((), lambda: [k, v])
    sends = [(step.send_to, _ranges(x, step.send_keys)) for x in (k, v)]
    recvs = [(step.recv_from, x.new_empty(_resized(x, step.num_recv))) for x in (k, v)]
    return comm.exchange(sends, recvs, group)


class _Returning:
    """Gradients of this rank's keys and values, on their way from the rank that computed them."""

    def __init__(self, step: Step | None, pending: comm.Pending[list[Tensor]]) -> None:
        self.step, self.pending = step, pending

    @classmethod
    def nothing(cls) -> _Returning:
        return cls(None, comm.Pending((), list))

    @classmethod
    def post(
        cls, sums: Gradients, k: Tensor, v: Tensor, step: Step, group: ProcessGroup | None
    ) -> _Returning:
        """Send the block's gradients to its owner; receive those of the keys sent before."""
        if step.is_own:
            return cls.nothing()
        num_sent = sum(span.num_tokens for span in step.send_keys)
        sends = [(step.recv_from, part.result()) for part in (sums.dk, sums.dv)]
        recvs = [(step.send_to, x.new_empty(_resized(x, num_sent))) for x in (k, v)]
        return cls(step, comm.exchange(sends, recvs, group))

    def add_to(self, grads: Gradients) -> None:
        arrived = self.pending.wait()
        if self.step is None:
            return
        for total, part in zip((grads.dk, grads.dv), arrived, strict=True):
            offset = 0
            for span in self.step.send_keys:
                total.add(part[:, offset : offset + span.num_tokens], start=span.start)
                offset += span.num_tokens


def _attend_share(
    sums: Gradients,
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    step: Step,
    scale: float,
) -> None:
    """`attend_backward` on the step's share of the heads."""
    heads = step.heads(k.shape[2])
    per_group = q.shape[2] // k.shape[2]
    rows = slice(heads.start * per_group, heads.stop * per_group)
    dout, q, out, lse = (x[:, :, rows] for x in (dout, q, out, lse))
    attend_backward(
        sums, dout, q, k[:, :, heads], v[:, :, heads], out, lse, step.tiles,
        scale=scale, head_start=heads.start,
    )  # fmt: skip


def _ranges(x: Tensor, spans: Sequence[Span]) -> Tensor:
    """The given ranges of x's tokens, end to end; a view if there is only one."""
    parts = [x[:, span.start : span.stop] for span in spans]
    return parts[0] if len(parts) == 1 else torch.cat([x[:, :0], *parts], 1)


def _resized(x: Tensor, num_tokens: int) -> tuple[int, ...]:
    return (x.shape[0], num_tokens, *x.shape[2:])
