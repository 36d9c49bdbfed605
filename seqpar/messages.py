"""Messages between two ranks, as many at once as there are: what `seqpar.comm` offers of them.

Ranks are group ranks. Over NCCL, or past it by copy engines where ranks of one host share memory
(`seqpar.peers.sharing`); a recorder in force is told of those that it can repeat.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar.kernels.recorder import current_recorder
from seqpar.message_bytes import from_bytes, landing_bytes, outgoing_bytes
from seqpar.peers.sharing import engines_of
from seqpar.pending import Pending
from seqpar.process_groups import group_rank, on_host
from seqpar.traffic import count

__all__ = ["exchange", "exchange_lent", "swap"]

_HEAD_START_CYCLES = 20_000


def exchange(
    sends: Sequence[tuple[int, Tensor]],
    recvs: Sequence[tuple[int, Tensor]],
    group: ProcessGroup | None,
    *,
    beside_work: bool = False,
    head_start: bool = False,
) -> Pending[list[Tensor]]:
    """Post every send and receive at once; the received tensors, in the order of `recvs`.

    Args:
        sends: (group rank to send to, tensor). May be on this rank itself.
        recvs: (group rank to receive from, contiguous tensor that is filled in place).
        beside_work: the current stream computes meanwhile. Copy engines carry what fits the room
            that `make_room` has made, if it has, and leave multiprocessors to the work.
        head_start: over NCCL, pause the current stream for 10 us. A kernel that fills the device
            and is ready when the messages are takes all room first, and they travel after it
            instead of beside it.

    Messages between two ranks arrive in the order they were listed. Empty ones are not sent, so
    both sides must know the sizes. With nothing to send or receive no call is made. Over NCCL all
    ranks of the group must have used it before, as those of `init_mesh` and `GroupPool` have.
    """
    rank = group_rank(group)
    own = [tensor for peer, tensor in sends if peer == rank]
    messages = [(p, outgoing_bytes(x, group)) for p, x in sends if p != rank and x.numel()]
    landings = []
    for peer, tensor in recvs:
        if peer == rank:
            tensor.copy_(own.pop(0))
        elif tensor.numel():
            landings.append((peer, landing_bytes(tensor, group), tensor))
    assert not own, "a message to this rank itself that it does not receive"

    def finish() -> list[Tensor]:
        for _, landing, tensor in landings:
            if landing.data_ptr() != tensor.data_ptr():
                tensor.copy_(landing.view(tensor.dtype).view(tensor.shape))
        return [tensor for _, tensor in recvs]

    arriving = [(peer, landing) for peer, landing, _ in landings]
    if not messages and not arriving:
        return Pending((), finish)
    sent_bytes, received_bytes = (sum(x.numel() for _, x in side) for side in (messages, arriving))
    count("exchange", sent_bytes, received_bytes)
    works, keep = [], messages
    if beside_work and (engines := engines_of(group)) is not None:
        work, messages, arriving = engines.post(messages, arriving)
        works.append(work)
    works += _post(messages, arriving, group, head_start=head_start)
    return Pending(works, finish, keep=keep)


def exchange_lent(
    sends: Sequence[tuple[int, Tensor]],
    recvs: Sequence[tuple[int, torch.Size]],
    like: Tensor,
    group: ProcessGroup | None,
) -> Pending[list[Tensor]]:
    """`exchange` beside work; what arrives may be lent, and is to be read by `Pending.read`.

    It saves copying it out of where copy engines have put it.

    Args:
        recvs: (group rank to receive from, shape); dtype and device are `like`'s.
    """
    itemsize, rank = like.element_size(), group_rank(group)
    sizes = [(peer, shape.numel() * itemsize) for peer, shape in recvs if shape.numel()]
    messages = [(peer, outgoing_bytes(x, group)) for peer, x in sends if x.numel()]
    engines = engines_of(group) if messages or sizes else None
    to_itself = any(peer == rank for peer, _ in [*sends, *recvs])
    loan = None if engines is None or to_itself else engines.lend(messages, sizes)
    if loan is None:
        landings = [(peer, like.new_empty(shape)) for peer, shape in recvs]
        return exchange(sends, landings, group, beside_work=True)
    count("exchange", sum(x.numel() for _, x in messages), sum(size for _, size in sizes))

    def lent() -> list[Tensor]:
        arrived = iter(loan.messages)
        return [
            from_bytes(next(arrived), shape, like) if shape.numel() else like.new_empty(shape)
            for _, shape in recvs
        ]

    return Pending((loan,), lent, keep=messages, give_back=loan.give_back)


def _post(
    sends: Sequence[tuple[int, Tensor]],
    recvs: Sequence[tuple[int, Tensor]],
    group: ProcessGroup | None,
    *,
    head_start: bool,
) -> list[Any]:
    """Start messages over the group's backend, flat bytes between this rank and others."""
    ops = [dist.P2POp(dist.isend, x, group=group, group_peer=peer) for peer, x in sends]
    ops += [dist.P2POp(dist.irecv, x, group=group, group_peer=peer) for peer, x in recvs]
    works = dist.batch_isend_irecv(ops) if ops else []
    if works and head_start and not on_host(group):
        torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
    return works


def swap(
    sends: Sequence[tuple[int, Tensor]],
    recvs: Sequence[tuple[int, Tensor]],
    group: ProcessGroup | None,
) -> None:
    """`exchange`, waited for at once; a recorder in force writes it down, to be repeated."""
    recorder, rank = current_recorder(), group_rank(group)
    moved = [*sends, *recvs]
    staged = any(x.is_cuda for _, x in moved) and on_host(group)
    if recorder is None or staged or any(r == rank or not x.numel() for r, x in moved):
        exchange(sends, recvs, group).wait()
        return
    if group is None or not moved:
        return
    outgoing = [outgoing_bytes(x, group) for _, x in sends]
    landings = [landing_bytes(x, group) for _, x in recvs]
    count("exchange", sum(x.numel() for x in outgoing), sum(x.numel() for x in landings))
    peers = [r for r, _ in sends], [r for r, _ in recvs]
    recorder.do(_swapping(group, *peers), *outgoing, *landings)


def _swapping(group: ProcessGroup, targets: list[int], sources: list[int]) -> Callable[..., None]:
    """Messages out of and into memory that is there; whoever keeps this does not keep the group."""
    reference = weakref.ref(group)
    ways = [(dist.isend, peer) for peer in targets] + [(dist.irecv, peer) for peer in sources]

    def run(*tensors: Tensor) -> None:
        group = reference()
        ops = [
            dist.P2POp(way, x, group=group, group_peer=peer)
            for (way, peer), x in zip(ways, tensors, strict=True)
        ]
        for work in dist.batch_isend_irecv(ops):
            work.wait()

    return run
