"""Large messages within one host by copy engines: no multiprocessor sends, receives or waits.

NCCL's send and receive kernels take multiprocessors from the kernels they travel under, also while
they wait for a rank that is late. Here a rank's copy engine writes a message straight into its
peer's inbox over NVLink. The streams tell each other by words in the peers' memory; see
`seqpar.peers.flags`.

    receiver   grant: the inbox is free             |        deliver: copy it to where it belongs
    sender              | send: write the inbox, say so

An inbox holds one rank's message at a time. The messages of one exchange are ordered by how far
they travel, (receiver - sender) mod W, and each is granted, sent and delivered in that order, so no
circle of ranks can wait for each other, even where streams share one queue of the device.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar.errors import MeshError
from seqpar.peers.exchange_limit import ExchangeLimit
from seqpar.peers.flags import wait_for_word, write_word
from seqpar.peers.memory import ApartError, timeout_of, together

__all__ = ["Inboxes", "Loan", "PeerExchange", "program", "rounded_up"]

Action = Literal["grant", "send", "deliver"]
_log = logging.getLogger(__name__)
Messages = list[tuple[int, Tensor]]
_FLAG_BYTES = 4
_ALIGNMENT = 256


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


def rounded_up(num_bytes: int) -> int:
    """An inbox for messages of so many bytes: a quarter more at most, so that few are made."""
    step = 1 << max(8, num_bytes.bit_length() - 3)
    return -(-num_bytes // step) * step


class Inboxes:
    """A group's `PeerExchange`, made when it is first needed and made anew for larger messages."""

    def __init__(self) -> None:
        self.exchange: PeerExchange | None = None
        self._asked = 0

    @property
    def num_bytes(self) -> int:
        """What the inbox takes of this device's memory."""
        return 0 if self.exchange is None else self.exchange.capacity_bytes

    def make_room(self, group: ProcessGroup, num_bytes: int, *, at_most: int) -> None:
        """Let one rank send another `num_bytes` in one exchange, if all ranks have that to spare.

        Collective when it is more than was ever asked for; all ranks ask alike. Where it would be
        more than `at_most` bytes on any rank, what is there stays; where memory cannot be had,
        nothing is there. NCCL moves what does not fit.
        """
        if num_bytes <= self._asked:
            return
        self._asked = rounded_up(num_bytes)
        torch.cuda.synchronize()  # nobody writes to the old inbox once all have come here
        try:
            together(group, lambda: _check_size(self._asked, at_most))
            self.exchange = None
            self.exchange = PeerExchange(group, self._asked)
        except ApartError as reason:
            _log.info("no inbox for %d bytes, NCCL moves such messages: %s", num_bytes, reason)


def _check_size(num_bytes: int, at_most: int) -> None:
    if num_bytes > at_most:
        raise MeshError(f"an inbox of {num_bytes} bytes is over the {at_most} that may be spared")


class PeerExchange:
    """An inbox on each device of a group, in one host, that the others write to.

    Made collectively; all ranks call `exchange` in one order. A rank that has waited for another as
    long as the group's collectives may ends its process, as NCCL's watchdog does; see
    `seqpar.peers.exchange_limit`. CUDA graphs cannot capture it: the host counts the messages.

    Args:
        capacity_bytes: of an inbox: the most that one rank sends another in one exchange.

    Raises:
        ApartError: on all ranks, if any could not make its part.
    """

    def __init__(self, group: ProcessGroup, capacity_bytes: int) -> None:
        from torch.distributed import _symmetric_memory

        self.capacity_bytes = capacity_bytes
        self._rank, self._size = group.rank(), group.size()
        self._flag_bytes = _aligned(2 * self._size * _FLAG_BYTES)
        self._sent, self._received, self._count = [0] * self._size, [0] * self._size, 0
        num_bytes = self._flag_bytes + _aligned(capacity_bytes)
        # Kept for as long as this object: peers write to it.
        self._memory = together(group, lambda: _flags_cleared(num_bytes, self._flag_bytes))
        self._handle = together(
            group, lambda: _symmetric_memory.rendezvous(self._memory, group.group_name)
        )
        together(group, lambda: self._open(group, num_bytes))

    def _open(self, group: ProcessGroup, num_bytes: int) -> None:
        """Raises where the driver has no such words; all ranks' are zero from here on."""
        offset = getattr(self._handle, "offset", 0)
        self._regions = [
            self._handle.get_buffer(peer, (num_bytes,), torch.uint8, offset)
            for peer in range(self._size)
        ]
        device = self._memory.device
        self._sending: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._receiving: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        for stream in (self._sending, self._receiving):
            own = self._granted(self._rank, by=self._rank)  # nobody else's
            write_word(stream, own, 0)
            wait_for_word(stream, own, 0)
        torch.cuda.synchronize()
        ranks = dist.get_process_group_ranks(group)
        self._limit = ExchangeLimit(ranks, self._rank, 2, timeout_of(group))

    def post(self, sends: Messages, recvs: Messages) -> tuple[Any, Messages, Messages]:
        """Post the messages of those pairs of ranks whose messages fit an inbox together.

        Args:
            sends: (receiver, flat uint8 tensor), which must live until the wait. recvs: (sender,
                flat uint8 tensor that is written).

        Returns:
            What is to be waited for, with `.wait()`, and the messages that are left to others.
        """
        direct, expected = self._fitting(sends), self._fitting(recvs)
        work = self.exchange(direct, expected)
        left = [(peer, x) for peer, x in sends if peer not in direct]
        return work, left, [(peer, x) for peer, x in recvs if peer not in expected]

    def lend(self, sends: Messages, recvs: Sequence[tuple[int, int]]) -> Loan | None:
        """Post messages of which those that arrive stay in the inbox, to be read there.

        Args:
            sends: as in `post`. recvs: (sender, bytes).

        Returns:
            None, with nothing posted, if several ranks send here or a message does not fit.
        """
        direct, sizes = self._fitting(sends), [size for _, size in recvs]
        senders = {peer for peer, _ in recvs}
        fits = sum(map(_aligned, sizes)) <= self.capacity_bytes
        if len(senders) > 1 or not fits or any(peer not in direct for peer, _ in sends):
            return None
        work = self.exchange(direct, dict.fromkeys(senders, ()))  # delivers nothing
        return Loan(self, work, self._places(self._rank, sizes))

    def _fitting(self, messages: Messages) -> dict[int, list[Tensor]]:
        """By peer; both sides of a pair know the sizes, so they decide alike."""
        by_peer: dict[int, list[Tensor]] = {}
        for peer, message in messages:
            by_peer.setdefault(peer, []).append(message)
        return {
            peer: each
            for peer, each in by_peer.items()
            if sum(_aligned(x.numel()) for x in each) <= self.capacity_bytes
        }

    def exchange(
        self, sends: Mapping[int, Sequence[Tensor]], recvs: Mapping[int, Sequence[Tensor]]
    ) -> Any:
        """Under way: what is to be waited for, with `.wait()`.

        Args:
            sends: by receiver; flat uint8 tensors, which must live until the wait.
            recvs: by sender; flat uint8 tensors that are written.
        """
        ready = torch.cuda.current_stream().record_event()
        self._count += 1
        self._limit.posted(self._count, sorted({*sends, *recvs}))
        self._sending.wait_event(ready)
        for action, peer in program(self._rank, self._size, list(sends), list(recvs)):
            if action == "grant":
                self._grant(peer)
            elif action == "send":
                self._send(peer, sends[peer])
            else:
                self._receiving.wait_event(ready)  # a grant need not wait for it
                self._deliver(peer, recvs[peer])
        for place, stream in enumerate((self._sending, self._receiving)):
            write_word(stream, self._limit.address(place), self._count)
        return _Streams([self._sending.record_event(), self._receiving.record_event()])

    def _grant(self, peer: int) -> None:
        """After what the inbox held has been copied out: the receiving stream's order."""
        self._received[peer] += 1
        write_word(self._receiving, self._granted(peer, by=self._rank), self._received[peer])

    def _send(self, peer: int, messages: Sequence[Tensor]) -> None:
        self._sent[peer] += 1
        wait_for_word(self._sending, self._granted(self._rank, by=peer), self._sent[peer])
        with torch.cuda.stream(self._sending):
            places = self._places(peer, [message.numel() for message in messages])
            for place, message in zip(places, messages, strict=True):
                place.copy_(message, non_blocking=True)
        write_word(self._sending, self._delivered(peer, by=self._rank), self._sent[peer])

    def _deliver(self, peer: int, messages: Sequence[Tensor]) -> None:
        wait_for_word(self._receiving, self._delivered(self._rank, by=peer), self._received[peer])
        with torch.cuda.stream(self._receiving):
            places = self._places(self._rank, [message.numel() for message in messages])
            for place, message in zip(places, messages, strict=True):
                message.copy_(place, non_blocking=True)

    def _places(self, owner: int, sizes: Sequence[int]) -> list[Tensor]:
        """Where messages of so many bytes lie in a rank's inbox, end to end."""
        starts = itertools.accumulate(map(_aligned, sizes), initial=self._flag_bytes)
        return [
            self._regions[owner][start : start + size]
            for start, size in zip(starts, sizes, strict=False)
        ]

    @property
    def num_posted(self) -> int:
        """How many exchanges have begun."""
        return self._count

    def kept_until_now(self) -> None:
        """The inbox is not written before what the current stream has been given is done."""
        self._receiving.wait_event(torch.cuda.current_stream().record_event())

    def _granted(self, owner: int, *, by: int) -> int:
        """The address of a word in `owner`'s memory: how many messages `by` let it send."""
        return self._regions[owner].data_ptr() + by * _FLAG_BYTES

    def _delivered(self, owner: int, *, by: int) -> int:
        """The address of a word in `owner`'s memory: how many messages `by` has sent it."""
        return self._regions[owner].data_ptr() + (self._size + by) * _FLAG_BYTES


class Loan:
    """Messages in this rank's inbox, to be read there before the next exchange is posted."""

    def __init__(self, engines: PeerExchange, work: Any, messages: list[Tensor]) -> None:
        self.messages = messages
        self._engines, self._work, self._number = engines, work, engines.num_posted

    def wait(self) -> None:
        """The current stream waits until all have arrived, and what was sent may be written."""
        self._work.wait()

    def give_back(self) -> None:
        """What reads them is on the current stream; later exchanges write the inbox after that."""
        assert self._number == self._engines.num_posted, "the inbox may have been written again"
        self._engines.kept_until_now()


class _Streams:
    """The current stream waits for events of others."""

    def __init__(self, events: Sequence[torch.cuda.Event]) -> None:
        self._events = events

    def wait(self) -> None:
        for event in self._events:
            torch.cuda.current_stream().wait_event(event)


def _flags_cleared(num_bytes: int, flag_bytes: int) -> Tensor:
    from torch.distributed import _symmetric_memory

    device = torch.device("cuda", torch.cuda.current_device())
    memory: Tensor = _symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    memory[:flag_bytes].zero_()
    torch.cuda.synchronize()
    return memory


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
