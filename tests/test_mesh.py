"""The mesh is made from the environment; the pool makes each group once."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from seqpar import comm
from seqpar.errors import MeshError
from seqpar.mesh import GroupPool, init_mesh
from tests.ranks import run_ranks


def _mesh(rank: int) -> tuple[list[int], list[int]]:
    mesh = init_mesh(dp=2, sp=2, share_memory=True)
    assert not comm.shares_memory(mesh["sp"].get_group()), "no CUDA device, nothing to share"
    members = []
    for axis in ("dp", "sp"):
        group = mesh[axis].get_group()
        members.append(comm.all_gather(torch.tensor(rank), group).tolist())
    with pytest.raises(MeshError, match="3 \\* 2 = 6, but 4 ranks"):
        init_mesh(dp=3, sp=2)
    return members[0], members[1]


def test_neighbouring_ranks_share_a_stream() -> None:
    results = run_ranks(4, _mesh)
    assert results == [([0, 2], [0, 1]), ([1, 3], [0, 1]), ([0, 2], [2, 3]), ([1, 3], [2, 3])]


def _pool(rank: int) -> None:
    pool = GroupPool(share_memory=True)
    pool.prepare([(0, 1), (2, 3), (0, 1, 2, 3), (1,), (0, 1)])
    pair = (0, 1) if rank < 2 else (2, 3)
    group = pool.group(pair)
    assert comm.all_gather(torch.tensor(rank), group).tolist() == list(pair)
    pool.prepare([(0, 1), (1, 2), (2, 3)])
    assert pool.group(pair) is group
    assert pool.group((1,)) is None
    assert comm.all_gather(torch.tensor(rank), pool.group((0, 1, 2, 3))).tolist() == [0, 1, 2, 3]
    assert len(pool) == (3 if rank in (1, 2) else 2)
    with pytest.raises(MeshError, match="is not one of"):
        pool.group((2, 3) if rank < 2 else (0, 1))
    with pytest.raises(MeshError, match="prepare"):
        pool.group((0, 3))
    pool.close()
    assert len(pool) == 0
    assert dist.get_world_size() == 4


def test_pool_makes_each_group_once() -> None:
    run_ranks(4, _pool)


@pytest.mark.parametrize("ranks", [(), (1, 0), (0, 0), (0, 1), (-1,)])
def test_pool_refuses_what_is_no_group(ranks: tuple[int, ...]) -> None:
    with pytest.raises(MeshError, match="under 1"):
        GroupPool().prepare([ranks])


def test_mesh_of_one_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(MeshError, match="1 \\* 2 = 2, but 1 ranks"):
        init_mesh(sp=2)
    try:
        assert init_mesh()["sp"].size() == 1
    finally:
        dist.destroy_process_group()
