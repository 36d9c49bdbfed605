"""Communication as values: generators that ask for it, and who answers them.

`Steps` are a generator that yields requests and is sent what they deliver. Steps never touch a
process group, so the same function runs on a real group (`run_steps`) and in a simulator of W
ranks in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.kernels.recorder import not_recorded

__all__ = [
    "AllGather",
    "AllReduceSum",
    "AllToAll",
    "Beside",
    "Request",
    "Steps",
    "Swap",
    "Together",
    "run_steps",
]

T = TypeVar("T")


@dataclass(frozen=True)
class AllGather:
    """Delivers [W, *message.shape]: of the ranks in `sources`; the others' may be anything."""

    message: Tensor
    gives: bool = True
    """Whether this rank is among anyone's sources."""
    sources: tuple[int, ...] | None = None
    """None: all ranks."""


@dataclass(frozen=True)
class AllReduceSum:
    """Delivers the sum of the ranks' tensors."""

    message: Tensor


@dataclass(frozen=True)
class AllToAll:
    """Delivers the list of what each rank sent here."""

    sends: list[Tensor]
    recv_shapes: list[torch.Size]


@dataclass(frozen=True)
class Swap:
    """Point-to-point messages: (rank, tensor to send), (rank, tensor to fill).

    Delivers nothing: the received tensors are filled. What is sent must not be written afterwards.
    """

    sends: list[tuple[int, Tensor]]
    recvs: list[tuple[int, Tensor]]


@dataclass(frozen=True)
class Together:
    """Several requests posted at once. Delivers the list of what each delivers."""

    requests: list[AllGather | Swap]


@dataclass(frozen=True)
class Beside:
    """Run `exchange` and, while it is under way, `work`. Delivers (its result, work's result)."""

    exchange: Steps[Any]
    work: Callable[[], Any]
    reads: object
    """What `exchange` was made from. It may run on another stream, ahead of which its steps have
    ended: tensors of this one that nothing held would be given to `work` while they are sent."""


Request = AllGather | AllReduceSum | AllToAll | Swap | Together | Beside
Steps = Generator[Request, Any, T]


def run_steps(steps: Steps[T], group: ProcessGroup | None) -> T:
    """Answer the requests of this rank's steps on a process group, and return their result."""
    delivered = None
    while True:
        try:
            request = steps.send(delivered)
        except StopIteration as stop:
            result: T = stop.value
            return result
        delivered = _answer(request, group)


def _answer(request: Request, group: ProcessGroup | None) -> Any:
    """What a request delivers, waited for."""
    match request:
        case AllGather(message, gives, sources):
            return comm.all_gather(message, group, gives=gives, sources=sources)
        case AllReduceSum(message):
            return comm.all_reduce_sum(message, group)
        case Swap(sends, recvs):
            return comm.swap(sends, recvs, group)
        case Beside(exchange, work):  # `request` holds what the exchange reads until it is over
            under_way = _start(exchange, group)
            done = work()
            return under_way.wait(), done
        case _:
            return _post(request, group).wait()


def _post(request: Request, group: ProcessGroup | None) -> comm.Pending[Any]:
    """A request under way."""
    match request:
        case AllGather(message):
            return comm.all_gather_async(message, group)
        case AllToAll(sends, recv_shapes):
            return comm.all_to_all_async(sends, recv_shapes, group)
        case Swap(sends, recvs):
            return comm.exchange(sends, recvs, group)
        case Together(requests):
            posted = [_post(item, group) for item in requests]
            return comm.Pending((), lambda: [pending.wait() for pending in posted])
        case _:
            return comm.Pending((), lambda: _answer(request, group))


def _start(steps: Steps[T], group: ProcessGroup | None) -> comm.Pending[T]:
    """Steps under way beside what the caller queues next.

    Where the backend works on streams, all of them are queued on a side stream at once. Elsewhere
    the first request is posted, and waiting for the result does the rest.
    """
    side = _side_stream(group)
    if side is not None:
        return _on_stream(steps, group, side)
    try:
        first = _post(steps.send(None), group)
    except StopIteration as stop:
        result: T = stop.value
        return comm.Pending((), lambda: result)
    return comm.Pending((), lambda: run_steps(_resumed(steps, first.wait()), group))


def _resumed(steps: Steps[T], delivered: Any) -> Steps[T]:
    """Steps that stand at a request, which has delivered."""
    while True:
        try:
            delivered = yield steps.send(delivered)
        except StopIteration as stop:
            result: T = stop.value
            return result


def _on_stream(
    steps: Steps[T], group: ProcessGroup | None, side: torch.cuda.Stream
) -> comm.Pending[T]:
    """All steps queued on a stream; to wait makes the current stream wait for it."""
    not_recorded("work on two streams")
    side.wait_stream(torch.cuda.current_stream(side.device))
    with torch.cuda.stream(side):
        result = run_steps(steps, group)

    def wait() -> T:
        current = torch.cuda.current_stream(side.device)
        current.wait_stream(side)
        for tensor in result.values() if isinstance(result, dict) else ():
            tensor.record_stream(current)
        return result

    return comm.Pending((), wait)


def _side_stream(group: ProcessGroup | None) -> torch.cuda.Stream | None:
    """A stream beside the current one, where the group's backend works on streams."""
    if group is None or comm.backend_of(group) != "nccl":
        return None
    return _stream_of(torch.cuda.current_device())


@lru_cache(maxsize=16)
def _stream_of(device: int) -> torch.cuda.Stream:
    """One stream a device: with more, each would hold memory of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
