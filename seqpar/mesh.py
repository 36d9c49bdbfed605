"""Named mesh axes, and the pool of process groups by degree.

`init_mesh` makes the static mesh of a job. A plan changes which ranks work together from step to
step; `GroupPool` keeps the process groups that plans ask for, each made once and reused.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqpar import comm
from seqpar.errors import MeshError

__all__ = ["GroupPool", "init_mesh"]

_MOST_SHARING = 16
"""Groups of a pool, of one rank, that share memory."""


def init_mesh(
    *, dp: int = 1, sp: int = 1, timeout: timedelta | None = None, share_memory: bool = True
) -> DeviceMesh:
    """A mesh with the axes "dp" (whole streams) and "sp" (parts of one stream).

    Neighbouring global ranks share an "sp" group. If nobody has initialised torch.distributed, it
    is initialised from torchrun's environment: NCCL on `cuda:LOCAL_RANK` where CUDA devices exist,
    else gloo; without RANK in the environment it is a world of one.

    Args:
        dp: how many streams are worked on at once.
        sp: how many ranks one stream is scattered over.
        timeout: how long a collective may wait, if torch.distributed is initialised here.
        share_memory: let the CUDA ranks of an "sp" group read each other's memory, if all are on
            one host and can: small all_gathers then take half the time. Costs 16 MiB a device and a
            trial. Where they cannot, NCCL is used; `comm.shares_memory(group)` says which it is.

    Raises:
        MeshError: dp * sp is not the world size, or is not positive.
    """
    if dp < 1 or sp < 1:
        raise MeshError(f"a mesh axis needs at least 1 rank, got {dp=}, {sp=}")
    has_cuda = torch.cuda.is_available()
    if not dist.is_initialized():
        _check_size(dp, sp, int(os.environ.get("WORLD_SIZE", "1")))
        _initialise(has_cuda, timeout)
    _check_size(dp, sp, dist.get_world_size())
    device_type = "cuda" if "nccl" in dist.get_backend() else "cpu"
    mesh = init_device_mesh(device_type, (dp, sp), mesh_dim_names=("dp", "sp"))
    if share_memory:
        comm.share_memory(mesh["sp"].get_group())
    return mesh


def _check_size(dp: int, sp: int, world_size: int) -> None:
    if dp * sp != world_size:
        raise MeshError(
            f"dp * sp must be the world size: {dp} * {sp} = {dp * sp}, but {world_size} ranks "
            f"were started; change the axes or start {dp * sp} ranks"
        )


def _initialise(has_cuda: bool, timeout: timedelta | None) -> None:
    if "RANK" not in os.environ:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("nccl" if has_cuda else "gloo", store=store, rank=0, world_size=1)
    elif has_cuda:
        # With the device known, communicators are made at once. Point-to-point messages need
        # that: made lazily, a communicator waits for every rank of its group.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)


class GroupPool:
    """Process groups of the world, by their global ranks; each is made once and reused.

    Example: with 4 ranks, `pool.prepare([(0, 1), (2, 3), (0, 1, 2, 3)])` on all of them, and then
    `pool.group((0, 1))` on ranks 0 and 1. `share_memory` is that of `init_mesh`, for each group
    until one of its ranks is in 16 groups that share: 256 MiB of each device at most.
    """

    def __init__(self, *, share_memory: bool = True) -> None:
        self._groups: dict[tuple[int, ...], ProcessGroup | None] = {}
        self._share_memory = share_memory
        self._shares: Counter[int] = Counter()

    def prepare(self, groups: Sequence[tuple[int, ...]]) -> None:
        """Make the groups that do not exist yet. Collective: the same argument on every rank.

        Ranks of a group stand in the order of the tuple, which must be increasing.

        Raises:
            MeshError: a group that is empty, does not increase, or leaves the world.
        """
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        for ranks in groups:
            _check_ranks(tuple(ranks), world_size)
        for ranks in groups:
            if tuple(ranks) not in self._groups:
                self._groups[tuple(ranks)] = self._made(tuple(ranks))

    def _made(self, ranks: tuple[int, ...]) -> ProcessGroup | None:
        group = _new_group(ranks)
        # Every rank of the world counts for every rank, so that members decide alike.
        most = max(self._shares[rank] for rank in ranks)
        if self._share_memory and len(ranks) > 1 and most < _MOST_SHARING:
            comm.share_memory(group)
            self._shares.update(ranks)
        return group

    def group(self, ranks: Sequence[int]) -> ProcessGroup | None:
        """The group of these global ranks; None for one rank alone.

        Raises:
            MeshError: the group was not prepared, or this rank is not in it.
        """
        key = tuple(ranks)
        if len(key) == 1:
            return None
        if key not in self._groups:
            raise MeshError(
                f"no group of ranks {key} in the pool: call prepare([{key}]) on every rank first; "
                f"it holds {sorted(self._groups)}"
            )
        group = self._groups[key]
        if group is None:
            raise MeshError(f"global rank {dist.get_rank()} is not one of the group's {key}")
        return group

    def __len__(self) -> int:
        return sum(group is not None for group in self._groups.values())

    def close(self) -> None:
        """Destroy the groups of this rank. Collective, like `prepare`."""
        for group in self._groups.values():
            if isinstance(group, ProcessGroup):
                dist.destroy_process_group(group)
        self._groups.clear()
        self._shares.clear()


def _check_ranks(ranks: tuple[int, ...], world_size: int) -> None:
    increasing = all(a < b for a, b in itertools.pairwise(ranks))
    if not ranks or not increasing or ranks[0] < 0 or ranks[-1] >= world_size:
        raise MeshError(
            f"a group is a non-empty, increasing tuple of ranks under {world_size}, got {ranks}"
        )


def _new_group(ranks: tuple[int, ...]) -> ProcessGroup | None:
    """None for one rank, and for a rank that is no member."""
    if len(ranks) == 1:
        return None
    group = dist.new_group(list(ranks))
    if dist.get_rank() not in ranks:
        return None
    assert isinstance(group, ProcessGroup)
    if "nccl" in dist.get_backend(group):
        # The first message on a lazy communicator must involve every member; make it now.
        dist.all_reduce(torch.zeros(1, device="cuda"), group=group)
    return group
