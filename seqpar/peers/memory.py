"""Small all_gathers within one host: memory of every device that all devices of a group can read.

A collective of NCCL takes its time to be queued and to start, whatever its size; for a state of
a few MiB that is most of it. Here each rank writes its tensor to memory that its peers can read
over NVLink, sets a flag in theirs, and reads what they wrote: one launch, captured by CUDA graphs
like any other. torch's symmetric memory makes the addresses; nothing of NVLink's multicast is used.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar.errors import MeshError
from seqpar.peers.memory_limit import WaitLimit

__all__ = ["ApartError", "PeerMemory", "open_on_one_host", "timeout_of", "together"]

M = TypeVar("M")

_log = logging.getLogger(__name__)
_WORD_BYTES = 4
_ALIGNMENT = 16
_TILE_WORDS = 8192
_MAX_BLOCKS = 64
_BUFFERS = 2
"""While the last but one call is being read, the next can be written."""
_TRIAL_LIMIT = timedelta(seconds=30)
_TRIAL_CALLS = 4
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


# -- what ranks do together or not at all -----------------------------------------------------


class ApartError(Exception):
    """A step has failed on some rank, which its message names; raised on all of them."""


def together(group: ProcessGroup, step: Callable[[], M]) -> M:
    """What `step` gives on this rank, if it succeeds on every rank. Collective.

    Raises:
        ApartError: on all ranks alike, if `step` raised on any: none goes on alone and waits.
    """
    made, problem = None, None
    try:
        made = step()
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    problems = {rank: text for rank, text in enumerate(_from_all(group, problem)) if text}
    if problems:
        raise ApartError(", ".join(f"rank {rank}: {text}" for rank, text in problems.items()))
    return made  # type: ignore[return-value]


def open_on_one_host(
    make: Callable[[ProcessGroup, int], M], group: ProcessGroup, capacity_bytes: int
) -> M | None:
    """What `make` makes for a group, or None if its ranks cannot use each other's memory.

    Collective: the same answer on every rank. `make` may itself go `together`, step by step, and
    must where a rank that fails would leave others waiting.
    """
    try:
        places = _from_all(group, together(group, _place))
        together(group, lambda: _check_places(places, group.rank()))
        return together(group, lambda: make(group, capacity_bytes))
    except ApartError as reason:
        _log.info("ranks do not use each other's memory, NCCL moves everything: %s", reason)
        return None


def _from_all(group: ProcessGroup, value: Any) -> list[Any]:
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _place() -> tuple[str, str, int]:
    """Which machine, container and device this is."""
    boot = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    try:
        container = os.readlink("/proc/self/ns/mnt")
    except OSError:
        container = ""
    return f"{socket.gethostname()} {boot}", container, torch.cuda.current_device()


def _check_places(places: list[tuple[str, str, int]], rank: int) -> None:
    """Refuse what torch's rendezvous would find out rank by rank, or not survive."""
    for what, values in zip(("hosts", "containers"), zip(*places, strict=True), strict=False):
        if len(set(values)) > 1:
            raise MeshError(f"several {what}: {sorted(set(values))}")
    devices = [device for _, _, device in places]
    if len(set(devices)) < len(devices):
        raise MeshError(f"each rank must see all devices under one numbering, not {devices}")
    for other in devices:
        if other != devices[rank] and not torch.cuda.can_device_access_peer(devices[rank], other):
            raise MeshError(f"device {devices[rank]} cannot read the memory of device {other}")


# -- the memory -------------------------------------------------------------------------------


class PeerMemory:
    """Memory of a group's devices, in one host, that each of them can read. Made collectively.

    Each call uses the other buffer: all ranks make the same calls in the same order, one after the
    other also where they are on several streams, since a launch counts on from the one before. A
    rank writes to a buffer only when all peers have read what it held, so none that gives runs
    ahead by over two calls.
    A rank that has waited for another as long as the group's collectives may ends its process, as
    NCCL's watchdog does; see `seqpar.peers.memory_limit`.
    """

    def __init__(self, group: ProcessGroup, capacity_bytes: int) -> None:
        from torch.distributed import _symmetric_memory

        self.capacity_bytes = capacity_bytes
        self._rank, self._size = group.rank(), group.size()
        self._launches: dict[tuple[int, bool, int], Any] = {}
        self._capacity_words = -(-capacity_bytes // _ALIGNMENT) * _ALIGNMENT // _WORD_BYTES
        flags = 2 * _MAX_BLOCKS + 2 * _MAX_BLOCKS * self._size
        words = flags + _BUFFERS * self._capacity_words
        device = torch.device("cuda", torch.cuda.current_device())

        def allocate() -> tuple[Tensor, WaitLimit, timedelta]:
            memory = _symmetric_memory.empty(words, dtype=torch.int32, device=device)
            limit = WaitLimit(dist.get_process_group_ranks(group), self._rank)
            return memory.zero_(), limit, timeout_of(group)

        # Kept for as long as this object: peers read it.
        self._memory, self._limit, timeout = together(group, allocate)
        self._handle = together(
            group, lambda: _symmetric_memory.rendezvous(self._memory, group.group_name)
        )
        self._peers = together(group, lambda: self._addresses(device))
        self._limit.tolerate(_TRIAL_LIMIT)
        together(group, self._try)
        self._limit.enforce(timeout)

    def _addresses(self, device: torch.device) -> Tensor:
        """[W + 1] int64: the ranks' memories as this device sees them, the page of the limit."""
        offset = getattr(self._handle, "offset", 0)
        addresses = [address + offset for address in self._handle.buffer_ptrs]
        table = torch.tensor([*addresses, self._limit.address], dtype=torch.int64, device=device)
        torch.cuda.synchronize()  # flags are zero before any peer sets them
        return table

    def _try(self) -> None:
        """Each kind of device, driver and compiler is believed only after it has delivered."""
        words = 3 * _TILE_WORDS
        own = torch.arange(words, dtype=torch.int32, device=self._memory.device)
        for call in range(_TRIAL_CALLS):
            gathered = own.new_full((self._size, words), -1)
            every = range(self._size)
            self.all_gather(own + (call + 7) * self._rank, gathered, gives=True, sources=every)
            expected = own + (call + 7) * torch.arange(self._size, device=own.device)[:, None]
            if not torch.equal(gathered.long(), expected):
                raise RuntimeError(self._limit.problem() or f"trial {call} gave something else")

    def takes(self, message: Tensor) -> bool:
        """Whether `all_gather` can carry such a message: the same answer on every rank."""
        size = message.numel() * message.element_size()
        return size <= self.capacity_bytes and size % _WORD_BYTES == 0

    def all_gather(
        self, message: Tensor, gathered: Tensor, *, gives: bool, sources: Iterable[int]
    ) -> None:
        """Fill `gathered` [W, *message.shape], queued on the current stream; both contiguous.

        Args:
            gives: whether any rank reads this one's message.
            sources: ranks to read, which give; a rank that reads nothing does not wait.
        """
        if message.data_ptr() % _ALIGNMENT:
            message = message.clone()
        words = message.numel() * message.element_size() // _WORD_BYTES
        key = (words, gives, sum(1 << rank for rank in sources))
        launch = self._launches.get(key)
        if launch is None:
            launch = self._launches[key] = self._launch(*key)
        launch(message, gathered)

    def _launch(self, words: int, gives: bool, sources: int) -> Any:
        from seqpar.kernels.launch import Launch
        from seqpar.kernels.peer_gather_kernel import peer_gather_kernel

        fixed = {
            "p_peers": self._peers,
            "words": words,
            "capacity": self._capacity_words,
            "GIVES": gives,
            "SOURCES": sources,
            "RANK": self._rank,
            "W": self._size,
            "BLOCKS": _MAX_BLOCKS,
            "TILE": _TILE_WORDS,
            "LIMITED": True,
        }
        grid = (min(_MAX_BLOCKS, -(-words // _TILE_WORDS)),)
        return Launch(peer_gather_kernel, grid, fixed=fixed, num_warps=8)


def timeout_of(group: ProcessGroup) -> timedelta:
    """How long a collective of the group, or of the world it is part of, may take."""
    device = torch.device("cuda")
    groups = (group, dist.group.WORLD)
    return min(g._get_backend(device).options._timeout for g in groups if g is not None)
