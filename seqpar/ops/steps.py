"""Communication as values: generators that ask for it, and who answers them.

`Steps` are a generator that yields requests and is sent what they deliver. Steps never touch a
process group, so the same function runs on a real group (`run_steps`) and in a simulator of W
ranks in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar import comm

__all__ = [
    "AllGather",
    "AllReduceSum",
    "AllToAll",
    "Beside",
    "Request",
    "Running",
    "Steps",
    "Swap",
    "Together",
    "run_steps",
]

T = TypeVar("T")


@dataclass(frozen=True)
class AllGather:
    """Delivers [W, *message.shape]."""

    message: Tensor


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


Request = AllGather | AllReduceSum | AllToAll | Swap | Together | Beside
Steps = Generator[Request, Any, T]


def run_steps(steps: Steps[T], group: ProcessGroup | None) -> T:
    """Answer the requests of this rank's steps on a process group, and return their result."""
    return Running(steps, group).wait()


class Running(Generic[T]):
    """Steps under way: the first request is posted when this is made, `wait` does the rest.

    With a side stream, all steps are queued on it at once, so that even an exchange of many rounds
    runs beside what the caller queues next.
    """

    def __init__(
        self,
        steps: Steps[T],
        group: ProcessGroup | None,
        *,
        side_stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._steps, self._group, self._side_stream = steps, group, side_stream
        self._pending: comm.Pending[Any] | None = None
        self._result: T
        if side_stream is None:
            self._advance(None)
            return
        side_stream.wait_stream(torch.cuda.current_stream(side_stream.device))
        with torch.cuda.stream(side_stream):
            self._advance(None)
            self._finish()

    def wait(self) -> T:
        """The result of the steps; on CUDA the current stream waits, not the host."""
        if self._side_stream is None:
            self._finish()
        else:
            current = torch.cuda.current_stream(self._side_stream.device)
            current.wait_stream(self._side_stream)
            for tensor in self._result.values() if isinstance(self._result, dict) else ():
                tensor.record_stream(current)
        return self._result

    def _finish(self) -> None:
        while self._pending is not None:
            self._advance(self._pending.wait())

    def _advance(self, delivered: Any) -> None:
        """Send in what was delivered and post the next request."""
        self._pending = None
        try:
            request = self._steps.send(delivered)
        except StopIteration as stop:
            self._result = stop.value
            return
        self._pending = self._post(request)

    def _post(self, request: Request) -> comm.Pending[Any]:
        match request:
            case AllGather(message):
                return comm.all_gather_async(message, self._group)
            case AllReduceSum(message):
                return comm.Pending((), lambda: comm.all_reduce_sum(message, self._group))
            case AllToAll(sends, recv_shapes):
                return comm.all_to_all_async(sends, recv_shapes, self._group)
            case Swap(sends, recvs):
                return comm.exchange(sends, recvs, self._group)
            case Together(requests):
                posted = [self._post(item) for item in requests]
                return comm.Pending((), lambda: [pending.wait() for pending in posted])
            case Beside(exchange, work):
                under_way = Running(exchange, self._group, side_stream=_side_stream(self._group))
                done = work()
                return comm.Pending((), lambda: (under_way.wait(), done))


def _side_stream(group: ProcessGroup | None) -> torch.cuda.Stream | None:
    """A stream beside the current one, where the group's backend works on streams."""
    if group is None or comm.backend_of(group) != "nccl":
        return None
    return _stream_of(torch.cuda.current_device())


@lru_cache(maxsize=16)
def _stream_of(device: int) -> torch.cuda.Stream:
    """One stream a device: with more, each would hold memory of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
