"""Large messages within one host by copy engines: no multiprocessor sends, receives or waits.

NCCL's send and receive kernels take multiprocessors from the kernels they travel under, also while
they wait for a rank that is late. Here a rank's copy engine writes a message straight into its
peer's inbox over NVLink. The streams tell each other by flags in the peers' memory, which the
device's front end waits for and writes (cuStreamWaitValue32, cuStreamWriteValue32).

    receiver   grant: the inbox is free             |        deliver: copy it to where it belongs
    sender              | send: write the inbox, say so

An inbox holds one rank's message at a time. The messages of one exchange are ordered by how far
they travel, (receiver - sender) mod W, and each is granted, sent and delivered in that order, so no
circle of ranks can wait for each other, even where streams share one queue of the device.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["PeerExchange", "program"]

Action = Literal["grant", "send", "deliver"]
_FLAG_BYTES = 4
_ALIGNMENT = 256
_GREATER_OR_EQUAL = 0


def program(
    rank: int, size: int, send_to: Sequence[int], recv_from: Sequence[int]
) -> Iterator[tuple[Action, int]]:
    """What a rank does in one exchange, in order, with which peer."""
    for distance in range(1, size):
        reader, owner = (rank + distance) % size, (rank - distance) % size
        if owner in recv_from:
            yield "grant", owner
        if reader in send_to:
            yield "send", reader
        if owner in recv_from:
            yield "deliver", owner


class PeerExchange:
    """An inbox on each device of a group, in one host, that the others write to.

    All ranks call `exchange` in one order. A rank that never arrives leaves its peers waiting on
    the device, and NCCL's watchdog does not see it. CUDA graphs cannot capture it: flags count.

    Args:
        capacity_bytes: of an inbox: the most that one rank sends another in one exchange.
    """

    def __init__(self, group: ProcessGroup, capacity_bytes: int) -> None:
        from torch.distributed import _symmetric_memory

        self.capacity_bytes = capacity_bytes
        self._rank, self._size = group.rank(), group.size()
        self._flag_bytes = _aligned(2 * self._size * _FLAG_BYTES)
        num_bytes = self._flag_bytes + _aligned(capacity_bytes)
        device = torch.device("cuda", torch.cuda.current_device())
        # Kept for as long as this object: peers write to it.
        self._memory = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        self._handle = _symmetric_memory.rendezvous(self._memory, group.group_name)
        offset = getattr(self._handle, "offset", 0)
        self._regions = [
            self._handle.get_buffer(peer, (num_bytes,), torch.uint8, offset)
            for peer in range(self._size)
        ]
        self._sending: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._receiving: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._sent, self._received = [0] * self._size, [0] * self._size
        self._memory[: self._flag_bytes].zero_()
        torch.cuda.synchronize()
        dist.barrier(group)
        for peer in range(self._size):  # raises here where the driver refuses
            _write(self._sending, self._granted(peer, by=self._rank), 0)
            _wait(self._receiving, self._delivered(self._rank, by=peer), 0)
        torch.cuda.synchronize()  # or these zeros could come after the first counts

    def takes(self, message_bytes: Sequence[int]) -> bool:
        """Whether messages of these sizes from one rank to another fit an inbox; both ask it."""
        return sum(map(_aligned, message_bytes)) <= self.capacity_bytes

    def exchange(
        self, sends: Mapping[int, Sequence[Tensor]], recvs: Mapping[int, Sequence[Tensor]]
    ) -> Any:
        """Under way: what is to be waited for, with `.wait()`.

        Args:
            sends: by receiver; flat uint8 tensors, which must live until the wait.
            recvs: by sender; flat uint8 tensors that are written.
        """
        ready = torch.cuda.current_stream().record_event()
        self._sending.wait_event(ready)
        for action, peer in program(self._rank, self._size, list(sends), list(recvs)):
            if action == "grant":
                self._grant(peer)
            elif action == "send":
                self._send(peer, sends[peer])
            else:
                self._receiving.wait_event(ready)  # a grant need not wait for it
                self._deliver(peer, recvs[peer])
        return _Streams([self._sending.record_event(), self._receiving.record_event()])

    def _grant(self, peer: int) -> None:
        """After what the inbox held has been copied out: the receiving stream's order."""
        self._received[peer] += 1
        _write(self._receiving, self._granted(peer, by=self._rank), self._received[peer])

    def _send(self, peer: int, messages: Sequence[Tensor]) -> None:
        self._sent[peer] += 1
        _wait(self._sending, self._granted(self._rank, by=peer), self._sent[peer])
        with torch.cuda.stream(self._sending):
            for place, message in zip(self._places(peer, messages), messages, strict=True):
                place.copy_(message, non_blocking=True)
        _write(self._sending, self._delivered(peer, by=self._rank), self._sent[peer])

    def _deliver(self, peer: int, messages: Sequence[Tensor]) -> None:
        _wait(self._receiving, self._delivered(self._rank, by=peer), self._received[peer])
        with torch.cuda.stream(self._receiving):
            for place, message in zip(self._places(self._rank, messages), messages, strict=True):
                message.copy_(place, non_blocking=True)

    def _places(self, owner: int, messages: Sequence[Tensor]) -> list[Tensor]:
        """Where messages lie in a rank's inbox, end to end."""
        sizes = [message.numel() for message in messages]
        starts = itertools.accumulate(map(_aligned, sizes), initial=self._flag_bytes)
        return [
            self._regions[owner][start : start + size]
            for start, size in zip(starts, sizes, strict=False)
        ]

    def _granted(self, owner: int, *, by: int) -> int:
        """The address of a flag in `owner`'s memory: how many messages `by` let it send."""
        return self._regions[owner].data_ptr() + by * _FLAG_BYTES

    def _delivered(self, owner: int, *, by: int) -> int:
        """The address of a flag in `owner`'s memory: how many messages `by` has sent it."""
        return self._regions[owner].data_ptr() + (self._size + by) * _FLAG_BYTES


class _Streams:
    """The current stream waits for events of others."""

    def __init__(self, events: Sequence[torch.cuda.Event]) -> None:
        self._events = events

    def wait(self) -> None:
        for event in self._events:
            torch.cuda.current_stream().wait_event(event)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _wait(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """The stream waits until the flag is `value` or has passed it."""
    flag = ctypes.c_uint32(value)
    _check(_driver().cuStreamWaitValue32_v2(stream.cuda_stream, address, flag, _GREATER_OR_EQUAL))


def _write(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """The stream writes the flag, after everything before it can be seen by all devices."""
    flag = ctypes.c_uint32(value)
    _check(_driver().cuStreamWriteValue32_v2(stream.cuda_stream, address, flag, 0))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the driver refused a flag between devices: CUresult {status}")


@lru_cache(maxsize=1)
def _driver() -> Any:
    driver = ctypes.PyDLL("libcuda.so.1")
    for name in ("cuStreamWaitValue32_v2", "cuStreamWriteValue32_v2"):
        arguments = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32]
        getattr(driver, name).argtypes = arguments
    return driver
