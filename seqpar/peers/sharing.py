"""Which groups share memory within a host, so that messages go past NCCL.

Small all_gathers then are one launch (`seqpar.peers.memory`), and large messages beside work are
carried by copy engines (`seqpar.peers.exchange`). Groups that share nothing use their backend.
"""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping
from typing import TYPE_CHECKING

import torch
from torch.distributed import ProcessGroup

from seqpar.process_groups import group_size, on_host

if TYPE_CHECKING:
    from seqpar.peers.exchange import Inboxes, PeerExchange
    from seqpar.peers.memory import PeerMemory

__all__ = [
    "engines_of",
    "make_room",
    "memory_of",
    "share_memory",
    "shared_bytes",
    "shares_memory",
]

_SHARE_OF_DEVICE = 64
_SHARED: MutableMapping[ProcessGroup, PeerMemory | None] = weakref.WeakKeyDictionary()
"""Memory shared by `share_memory`, for as long as the group lives."""
_INBOXES: MutableMapping[ProcessGroup, Inboxes] = weakref.WeakKeyDictionary()
"""Memory shared by `make_room`, for as long as the group lives."""


def share_memory(group: ProcessGroup | None, *, max_bytes: int = 8 * 2**20) -> bool:
    """Let `all_gather` move messages of up to `max_bytes` without NCCL, where devices allow it.

    Collective, once for a group before it is used; `init_mesh` and `GroupPool` do it. For CUDA
    ranks of one host that can read each other's memory: each takes 2 * max_bytes of device memory,
    and a small all_gather then is one launch on the current stream. A group's all_gathers on
    several streams must be ordered by events, which NCCL, with a stream of its own, would do
    itself. Returns whether it is so, the same on every rank; elsewhere, and where any rank fails to
    set it up, nothing changes (the log says why, at level info). See `seqpar.peers.memory`.
    """
    if group is None or group_size(group) == 1 or on_host(group):
        return False
    if group not in _SHARED:
        from seqpar.peers.memory import PeerMemory, open_on_one_host

        _SHARED[group] = open_on_one_host(PeerMemory, group, max_bytes)
    return _SHARED[group] is not None


def shares_memory(group: ProcessGroup | None, num_bytes: int = 0) -> bool:
    """Whether `share_memory` is in force for the group, and for messages of so many bytes."""
    return 0 < shared_bytes(group) >= num_bytes


def shared_bytes(group: ProcessGroup | None) -> int:
    """The largest message that memory shared by the group carries; 0 if it shares none."""
    peers = memory_of(group)
    return 0 if peers is None else peers.capacity_bytes


def memory_of(group: ProcessGroup | None) -> PeerMemory | None:
    """What carries small all_gathers of the group past its backend."""
    return _SHARED.get(group) if _SHARED and group is not None else None


def make_room(group: ProcessGroup | None, num_bytes: int) -> None:
    """Let `exchange(beside_work=True)` move messages by copy engines instead of NCCL's kernels.

    Where `share_memory` is in force for the group; elsewhere, and while a graph is being captured,
    nothing happens. Collective: all ranks of the group ask alike, for the most that any rank sends
    another in one exchange. It costs nothing when there is room already; else each rank takes so
    much device memory, a quarter more at most, and waits for the others and for its device. No
    device gives more than a 64th of its memory to all groups together. See `seqpar.peers.exchange`.
    """
    if group is None or not num_bytes or not shares_memory(group):
        return
    if torch.cuda.is_current_stream_capturing():
        return
    if group not in _INBOXES:
        from seqpar.peers.exchange import Inboxes

        _INBOXES[group] = Inboxes()
    own = _INBOXES[group]
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    taken = sum(inboxes.num_bytes for inboxes in _INBOXES.values() if inboxes is not own)
    own.make_room(group, num_bytes, at_most=total // _SHARE_OF_DEVICE - taken)


def engines_of(group: ProcessGroup | None) -> PeerExchange | None:
    """What carries messages of the group beside work past its backend."""
    inboxes = _INBOXES.get(group) if _INBOXES and group is not None else None
    if inboxes is None or torch.cuda.is_current_stream_capturing():
        return None
    return inboxes.exchange
