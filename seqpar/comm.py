"""Every collective of operators, losses and data, each named for what it does.

Plain functions with the group explicit. Ranks are group ranks, never global ones. The forms that
end in `_async`, and `exchange`, return a `Pending`: what was asked is under way, the tensors are
valid after `wait()`. Buffers that were handed in must not be written before that.

`group=None` means "this rank alone": nothing is sent, and no process group is touched.

What backends lack is known here alone: gloo moves CPU tensors only (CUDA tensors are staged through
the host), and sums 16-bit floats in float32; `all_gather_into_tensor` was renamed
`all_gather_single` in torch 2.12. Tensors travel as bytes, so any dtype goes over any backend.

This is the one door: collectives are here, messages between two ranks in `seqpar.messages`.
`with count_traffic() as traffic:` adds up calls and payload bytes of this rank, by operation; see
`seqpar.traffic`. What goes past the backend, over memory that ranks of one host share, is decided
in `seqpar.peers.sharing`.
"""

from __future__ import annotations

import pickle
import weakref
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar.errors import LayoutError, SeqparError
from seqpar.kernels.recorder import current_recorder
from seqpar.message_bytes import bytes_of, from_bytes, outgoing_bytes
from seqpar.messages import exchange, exchange_lent, swap
from seqpar.peers.sharing import (
    make_room,
    memory_of,
    share_memory,
    shared_bytes,
    shares_memory,
)
from seqpar.pending import Pending
from seqpar.process_groups import backend_of, group_rank, group_size, on_host
from seqpar.traffic import (
    Operation,
    Traffic,
    count,
    count_into,
    count_traffic,
    current_traffic,
    report_saved,
)

__all__ = [
    "Operation",
    "Pending",
    "Traffic",
    "agree",
    "all_gather",
    "all_gather_async",
    "all_gather_objects",
    "all_reduce_sum",
    "all_to_all",
    "all_to_all_async",
    "backend_of",
    "broadcast",
    "broadcast_object",
    "count_into",
    "count_traffic",
    "current_traffic",
    "exchange",
    "exchange_lent",
    "group_rank",
    "group_size",
    "make_room",
    "report_saved",
    "share_memory",
    "shared_bytes",
    "shares_memory",
    "swap",
]

T = TypeVar("T")
_OBJECT_BYTES = 65536
_GATHER: Callable[..., Any] = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)


def all_gather(
    x: Tensor,
    group: ProcessGroup | None,
    *,
    gives: bool = True,
    sources: Collection[int] | None = None,
) -> Tensor:
    """[W, *x.shape]: every rank's tensor in rank order; x has one shape and dtype on all ranks.

    On CUDA it is queued on the current stream, which costs less than to post it and wait at once.

    Args:
        gives: whether any rank reads this one's tensor.
        sources: ranks whose tensors are wanted, which all give; None: all ranks. The others' may
            be anything. Over memory that peers read only these are moved and waited for.
    """
    if group is None or not x.is_cuda or on_host(group) or not x.numel():
        return all_gather_async(x, group).wait()
    size = group.size()
    peers = memory_of(group)
    if peers is not None and peers.takes(x):
        wanted = range(size) if sources is None else sources
        others = len(wanted) - (group.rank() in wanted)
        gathered, message = _gather_buffers(x, size, size - 1 if gives else 0, others)
        peers.all_gather(message, gathered, gives=gives, sources=wanted)
        return gathered
    gathered, message = _gather_buffers(x, size, size - 1, size - 1)
    if (recorder := current_recorder()) is not None:
        recorder.do(_gathering(group), gathered, message)
    else:
        _GATHER(gathered, message, group=group)
    return gathered


def all_gather_async(x: Tensor, group: ProcessGroup | None) -> Pending[Tensor]:
    """`all_gather`, under way."""
    if group is None:
        return Pending((), lambda: x.detach().clone()[None])
    staged = x.is_cuda and on_host(group)
    others = group.size() - 1
    gathered, message = _gather_buffers(x.cpu() if staged else x, others + 1, others, others)
    if not message.numel():
        return Pending((), lambda: gathered)
    # gloo wants them flat, and knows fewer dtypes than torch.
    landing, outgoing = bytes_of(gathered), bytes_of(message)
    work = _GATHER(landing, outgoing, group=group, async_op=True)
    return Pending((work,), lambda: gathered.to(x.device) if staged else gathered, keep=message)


def _gathering(group: ProcessGroup) -> Callable[[Tensor, Tensor], None]:
    """all_gather into memory that is there; whoever keeps this does not keep the group."""
    reference = weakref.ref(group)

    def gather(gathered: Tensor, message: Tensor) -> None:
        _GATHER(gathered, message, group=reference())

    return gather


def _gather_buffers(x: Tensor, size: int, sends: int, receives: int) -> tuple[Tensor, Tensor]:
    """Memory for what an all_gather of x delivers, and x as it is sent.

    Counts the bytes: to so many ranks and from so many.
    """
    message = (x.detach() if x.requires_grad else x).contiguous()
    message_bytes = message.numel() * message.element_size()
    if message_bytes and size > 1:
        count("all_gather", sends * message_bytes, receives * message_bytes)
    return message.new_empty((size, *message.shape)), message


def all_to_all(
    sends: Sequence[Tensor], recv_shapes: Sequence[Sequence[int]], group: ProcessGroup | None
) -> list[Tensor]:
    """Send `sends[r]` to rank r; the list of what each rank sent here. Any may be empty.

    Args:
        sends: one tensor for each rank, of one dtype and device.
        recv_shapes: the shape of what comes from each rank.
    """
    return all_to_all_async(sends, recv_shapes, group).wait()


def all_to_all_async(
    sends: Sequence[Tensor], recv_shapes: Sequence[Sequence[int]], group: ProcessGroup | None
) -> Pending[list[Tensor]]:
    """`all_to_all`, under way."""
    size, rank = group_size(group), group_rank(group)
    assert len(sends) == len(recv_shapes) == size, "one tensor and one shape for each rank"
    if group is None:
        return Pending((), lambda: [sends[0].detach().clone()])
    item = sends[0].element_size()
    out_sizes = [torch.Size(shape).numel() * item for shape in recv_shapes]
    in_sizes = [tensor.numel() * item for tensor in sends]
    message = torch.cat([outgoing_bytes(tensor, group) for tensor in sends])
    received = message.new_empty(sum(out_sizes))
    count("all_to_all", sum(in_sizes) - in_sizes[rank], sum(out_sizes) - out_sizes[rank])
    work = dist.all_to_all_single(
        received, message, out_sizes, in_sizes, group=group, async_op=True
    )

    def finish() -> list[Tensor]:
        parts = torch.split(received, out_sizes)
        return [from_bytes(p, s, sends[0]) for p, s in zip(parts, recv_shapes, strict=True)]

    return Pending((work,), finish, keep=message)


def all_reduce_sum(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum of every rank's tensor, a new tensor of x's dtype on every rank."""
    total = x.detach().clone()
    if group is None:
        return total
    ring_bytes = 2 * (group.size() - 1) * total.numel() * total.element_size() // group.size()
    count("all_reduce_sum", ring_bytes, ring_bytes)
    if on_host(group):
        narrow = total.dtype in (torch.float16, torch.bfloat16)
        total = total.to(device="cpu", dtype=torch.float32 if narrow else total.dtype)
    dist.all_reduce(total, group=group)
    return total.to(device=x.device, dtype=x.dtype)


def broadcast(x: Tensor, group: ProcessGroup | None, *, source: int = 0) -> Tensor:
    """Rank `source`'s tensor, a new tensor on every rank; shape and dtype are the same on all."""
    if group is None or not x.numel():
        return x.detach().clone()
    message = outgoing_bytes(x, group).clone()
    is_source = group_rank(group) == source
    others = group.size() - 1
    count(
        "broadcast",
        message.numel() * others if is_source else 0,
        0 if is_source else message.numel(),
    )
    dist.broadcast(message, group=group, group_src=source)
    return from_bytes(message, x.shape, x)


def broadcast_object(value: T | None, group: ProcessGroup | None, *, source: int = 0) -> T:
    """Rank `source`'s picklable object on every rank.

    One message when the pickle is under 64 KiB, two when it is longer.
    """
    if group is None:
        return value  # type: ignore[return-value]
    payload = pickle.dumps(value) if group_rank(group) == source else b""
    head = len(payload).to_bytes(8, "little") + payload[: _OBJECT_BYTES - 8]
    received = _broadcast_bytes(head, _OBJECT_BYTES, group, source)
    total = int.from_bytes(received[:8], "little")
    body = received[8 : 8 + total]
    if total > len(body):
        rest = payload[_OBJECT_BYTES - 8 :]
        body += _broadcast_bytes(rest, total - len(body), group, source)
    result: T = pickle.loads(body)
    return result


def all_gather_objects(value: T, group: ProcessGroup | None) -> list[T]:
    """Every rank's picklable object in rank order. Several messages, waited for on the host."""
    if group is None:
        return [value]
    values = [value] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def agree(
    problem: str | None,
    group: ProcessGroup | None,
    *,
    same: object = None,
    error: type[SeqparError] = LayoutError,
) -> None:
    """Raise on every rank alike if any rank has a problem, or if they differ about `same`.

    One all_gather of 16 bytes a rank; on CUDA the host waits for it. Only when something is wrong
    are the messages themselves gathered.

    Args:
        problem: what is wrong on this rank; None if nothing.
        same: a value whose `repr` must be equal on all ranks, for example a layout with shapes.
        error: what to raise.
    """
    if group is None:
        if problem is not None:
            raise error(problem)
        return
    digest = zlib.crc32(repr(same).encode())
    device = "cpu" if on_host(group) else torch.device("cuda", torch.cuda.current_device())
    mine = torch.tensor([problem is not None, digest], dtype=torch.int64, device=device)
    flags = all_gather(mine, group).tolist()
    if not any(bad for bad, _ in flags) and len({digest for _, digest in flags}) == 1:
        return
    messages = all_gather_objects((problem, repr(same)), group)
    raise error(_disagreement(messages, group_rank(group)))


# -- private ----------------------------------------------------------------------------------


def _disagreement(messages: Sequence[tuple[str | None, str]], rank: int) -> str:
    refused = {r: text for r, (text, _) in enumerate(messages) if text is not None}
    if rank in refused:
        return refused[rank]
    if refused:
        first = min(refused)
        return (
            f"ranks {sorted(refused)} of the group refused their input; rank {first}: "
            + (refused[first])
        )
    odd = next(r for r, (_, value) in enumerate(messages) if value != messages[0][1])
    return (
        f"the ranks of the group were not given the same input: rank 0 has {messages[0][1]:.400}, "
        f"rank {odd} has {messages[odd][1]:.400}; give all ranks of one group the same"
    )


def _broadcast_bytes(data: bytes, size: int, group: ProcessGroup, source: int) -> bytes:
    device = "cpu" if on_host(group) else torch.device("cuda", torch.cuda.current_device())
    padded = data[:size].ljust(size, b"\0")
    buffer = torch.frombuffer(bytearray(padded), dtype=torch.uint8).to(device)
    return bytes(broadcast(buffer, group, source=source).cpu().numpy().tobytes())
