"""Small all_gathers within one host: memory of every device that all devices of a group can read.

A collective of NCCL takes its time to be queued and to start, whatever its size; for a state of
a few MiB that is most of it. Here each rank writes its tensor to memory that its peers can read
over NVLink, sets a flag in theirs, and reads what they wrote: one launch, captured by CUDA graphs
like any other. torch's symmetric memory makes the addresses; nothing of NVLink's multicast is used.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

__all__ = ["PeerMemory"]

_log = logging.getLogger(__name__)
_WORD_BYTES = 4
_ALIGNMENT = 16
_TILE_WORDS = 8192
_MAX_BLOCKS = 64
_BUFFERS = 2
"""While the last but one call is being read, the next can be written."""


class PeerMemory:
    """Memory of a group's devices, in one host, that each of them can read.

    Each call uses the other buffer: all ranks make the same calls in the same order. A rank writes
    to a buffer only when all peers have read what it held, so none runs ahead by over two calls.
    As with NCCL, a rank that never arrives leaves the others waiting on the device.
    """

    def __init__(self, group: ProcessGroup, capacity_bytes: int) -> None:
        from torch.distributed import _symmetric_memory

        self.capacity_bytes = capacity_bytes
        self._rank, self._size = group.rank(), group.size()
        self._launches: dict[tuple[int, bool, int], Any] = {}
        self._capacity_words = -(-capacity_bytes // _ALIGNMENT) * _ALIGNMENT // _WORD_BYTES
        flags = _MAX_BLOCKS + 2 * _MAX_BLOCKS * self._size
        words = flags + _BUFFERS * self._capacity_words
        device = torch.device("cuda", torch.cuda.current_device())
        # Kept for as long as this object: peers read it.
        self._memory = _symmetric_memory.empty(words, dtype=torch.int32, device=device)
        handle = _symmetric_memory.rendezvous(self._memory, group.group_name)
        self._handle = handle
        offset = getattr(handle, "offset", 0)
        addresses = [address + offset for address in handle.buffer_ptrs]
        self._peers = torch.tensor(addresses, dtype=torch.int64, device=device)
        self._memory.zero_()
        torch.cuda.synchronize()
        dist.barrier(group)

    @classmethod
    def open(cls, group: ProcessGroup, capacity_bytes: int) -> PeerMemory | None:
        """The memory of a group, or None if its ranks cannot read each other's. Collective."""
        hosts: list[Any] = [None] * group.size()
        dist.all_gather_object(hosts, socket.gethostname(), group=group)
        if len(set(hosts)) > 1 or group.size() == 1:
            return None
        memory, problem = None, None
        try:
            memory = cls(group, capacity_bytes)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        problems: list[Any] = [None] * group.size()
        dist.all_gather_object(problems, problem, group=group)
        if any(problems):
            _log.warning("devices cannot read each other's memory, NCCL is used: %s", problems)
            return None
        return memory

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
        }
        grid = (min(_MAX_BLOCKS, -(-words // _TILE_WORDS)),)
        return Launch(peer_gather_kernel, grid, fixed=fixed, num_warps=8)
