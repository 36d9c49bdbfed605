"""A process group, or None for "this rank alone": its size, this rank in it, what it moves."""

from __future__ import annotations

import weakref
from collections.abc import MutableMapping

import torch.distributed as dist
from torch.distributed import ProcessGroup

from seqpar.errors import MeshError

__all__ = ["backend_of", "group_rank", "group_size", "on_host"]

_BACKENDS: MutableMapping[ProcessGroup, str] = weakref.WeakKeyDictionary()
"""What `backend_of` has found out; torch takes longer to say it than to start a message."""


def group_size(group: ProcessGroup | None) -> int:
    """How many ranks; 1 for None.

    Raises:
        MeshError: this process is no member of the group.
    """
    if group is None:
        return 1
    try:
        return group.size()
    except AttributeError:
        raise _no_member() from None


def group_rank(group: ProcessGroup | None) -> int:
    """This rank within the group; 0 for None.

    Raises:
        MeshError: this process is no member of the group.
    """
    if group is None:
        return 0
    try:
        return group.rank()
    except AttributeError:
        raise _no_member() from None


def backend_of(group: ProcessGroup | None) -> str:
    """ "nccl" if the group moves CUDA tensors itself, else "gloo"; "none" for None.

    Raises:
        MeshError: this process is no member of the group.
    """
    if group is None:
        return "none"
    try:
        name = _BACKENDS.get(group)
    except TypeError:
        raise _no_member() from None
    if name is None:
        name = "nccl" if "nccl" in dist.get_backend(group) else "gloo"
        _BACKENDS[group] = name
    return name


def on_host(group: ProcessGroup | None) -> bool:
    """Whether the group's backend moves host memory only."""
    return backend_of(group) != "nccl"


def _no_member() -> MeshError:
    """For torch's stand-in for a group that this process is not in, which is a number."""
    return MeshError(f"global rank {dist.get_rank()} is not in the group it was handed")
