"""Communication as values: generators that ask for it, and who answers them.

`Steps` are a generator that yields requests and is sent what they deliver. Steps never touch a
process group, so the same function runs on a real group (`run_steps`) and in a simulator of W
ranks in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
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
class Beside:
    """Run `exchange` and, while it is under way, `work`. Delivers (its result, work's result)."""

    exchange: Steps[Any]
    work: Callable[[], Any]


Request = AllGather | AllReduceSum | AllToAll | Swap | Beside
Steps = Generator[Request, Any, T]


def run_steps(steps: Steps[T], group: ProcessGroup | None) -> T:
    """Answer the requests of this rank's steps on a process group, and return their result."""
    return Running(steps, group).wait()


class Running(Generic[T]):
    """Steps under way: the first request is posted when this is made, `wait` does the rest."""

    def __init__(self, steps: Steps[T], group: ProcessGroup | None) -> None:
        self._steps, self._group = steps, group
        self._pending: comm.Pending[Any] | None = None
        self._result: T
        self._advance(None)

    def wait(self) -> T:
        """The result of the steps."""
        while self._pending is not None:
            self._advance(self._pending.wait())
        return self._result

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
            case Beside(exchange, work):
                under_way = Running(exchange, self._group)
                done = work()
                return comm.Pending((), lambda: (under_way.wait(), done))
