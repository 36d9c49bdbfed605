"""What only several GPUs can show, for torchrun: `torchrun --nproc-per-node 2 state_on_gpus.py`.

A number after it says how many seconds it may take. Memory that peers read delivers what NCCL
delivers, whatever the order in which ranks arrive, eagerly and replayed; a layer captured in a CUDA
graph gives what it gives eagerly; and one that is repeated from its recording gives what it gave,
also where activation checkpointing runs it a second time.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar import comm
from seqpar.kernels.entry_product import LOG_FLOOR
from seqpar.layout import SequenceLayout
from seqpar.mesh import GroupPool, init_mesh
from seqpar.ops import state_recorded
from seqpar.ops.state import state_attention
from tests.ops.state_recomputed import Recomputed

LENGTHS = (4, 64, 4096, 40000, 524288, 1048576)
"""float32 elements of a message: one program, several, and several tiles a program."""
LIMIT_S = 120
"""Ranks that wait for one another say where they stand, and end."""
START = time.monotonic()


def main() -> None:
    faulthandler.dump_traceback_later(float(sys.argv[1]) if sys.argv[1:] else LIMIT_S, exit=True)
    logging.basicConfig()
    logging.getLogger("seqpar.peers.memory").setLevel(logging.INFO)  # says why there is none
    world_size = int(os.environ["WORLD_SIZE"])
    group = init_mesh(sp=world_size)["sp"].get_group()
    say("the mesh is made")
    pool = GroupPool(share_memory=False)
    pool.prepare([tuple(range(world_size))])
    _compare(group, pool.group(range(world_size)))
    if world_size == 4:
        pairs = init_mesh(dp=2, sp=2)["sp"].get_group()
        pool.prepare([(0, 1), (2, 3)])
        first = dist.get_rank() // 2 * 2
        _compare(pairs, pool.group((first, first + 1)))
    pool.close()
    dist.destroy_process_group()


def _compare(group: dist.ProcessGroup, over_nccl: dist.ProcessGroup) -> None:
    size = group.size()
    if comm.shares_memory(group):
        _gathers_like_nccl(group, over_nccl)
        _replays_like_nccl(group, over_nccl)
        say(f"peer memory delivers what NCCL delivers, {size} ranks")
    else:
        say("these devices cannot read each other's memory")
    for each, name in ((group, "peer memory"), (over_nccl, "NCCL")):
        _layer_again(each, size)
        say(f"a layer repeated from its recording gives what it gave, {size} ranks over {name}")
        for decays in (True, False):
            Recomputed(each, "cuda", (2048, 8, 128), decays=decays).check()
        say(f"recomputed layers give what they give otherwise, {size} ranks over {name}")
        _layer_in_a_graph(each, size)
        say(f"a captured layer gives what it gives eagerly, {size} ranks over {name}")


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"[{time.monotonic() - START:.1f} s] {text}", flush=True)


def _random(count: int) -> Tensor:
    return torch.randn(count, device="cuda")


def _gathers_like_nccl(group: dist.ProcessGroup, over_nccl: dist.ProcessGroup) -> None:
    torch.manual_seed(dist.get_rank())
    for turn in range(60):
        message = _random(LENGTHS[turn % len(LENGTHS)])
        if turn % dist.get_world_size() == dist.get_rank():
            torch.cuda._sleep(100_000)
        found = comm.all_gather(message, group)
        assert torch.equal(found, comm.all_gather(message, over_nccl)), turn


def _replays_like_nccl(group: dist.ProcessGroup, over_nccl: dist.ProcessGroup) -> None:
    message = _random(524288)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = [comm.all_gather(message * factor, group) for factor in range(1, 6)]
    for turn in range(10):
        message.normal_()
        graph.replay()
        if turn % 3 == 0:  # an eager call between replays
            comm.all_gather(message, group)
        for factor, found in enumerate(captured, 1):
            assert torch.equal(found, comm.all_gather(message * factor, over_nccl)), turn


def _layer_again(group: dist.ProcessGroup, world_size: int) -> None:
    """The first call of a kind runs as it is, the second is recorded, the third repeated.

    Decays that reach all ranks, the next rank with some heads, with all heads, and none.
    """
    torch.manual_seed(3 + dist.get_rank())
    for tokens, pace in ((1024, 1), (5000, 1), (2048, 40), (8192, 0)):
        layout = SequenceLayout.contiguous((0, tokens * world_size), world_size)
        slopes = -torch.exp2(-torch.arange(8.0, device="cuda") - 4) * pace
        shape, log_decay = (1, tokens, 8, 128), slopes if pace else None
        expected_bytes = _bytes(group, slopes.tolist(), tokens) * 128 * 128 * 4
        is_cut = pace == 1 and world_size > 2 and not comm.shares_memory(group)
        streams = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(8)]
        found = []
        for turn in range(6):
            leaves = [x.clone().requires_grad_() for x in streams[turn % 2 * 4 :][:3]]
            with comm.count_traffic() as traffic:
                o, _ = state_attention(
                    *leaves,
                    log_decay=log_decay,
                    layout=layout,
                    group=group,
                    exchange="all_gather",
                    check=False,
                )
                found.append([o, *torch.autograd.grad(o, leaves, streams[turn % 2 * 4 + 3])])
            assert traffic.received_bytes == expected_bytes, (turn, traffic)
            for x, expected in zip(found[-1], found[turn % 2], strict=True):
                assert torch.equal(x, expected), (tokens, turn)
        kinds = [x.call for x in state_recorded._CALLS[group].values() if x.layout is layout]
        assert [call.is_ready for call in kinds] == [not is_cut], (tokens, pace)


def _bytes(group: dist.ProcessGroup, log_decay: list[float], tokens: int) -> int:
    """Heads of states that a rank receives, forward and backward, each rank one link."""
    size, rank = group.size(), group.rank()
    reaches = [1 + min(size, int(LOG_FLOOR / (g * tokens)) if g else size) for g in log_decay]
    if comm.shares_memory(group):
        hops = max(reaches)
        return len(log_decay) * (min(rank, hops) + min(size - 1 - rank, hops))
    far = sum(reach > 1 for reach in reaches) if size > 2 else len(log_decay)
    near = len(log_decay) - far
    return 2 * (size - 1) * far + near * ((rank > 0) + (rank < size - 1))


def _layer_in_a_graph(group: dist.ProcessGroup, world_size: int) -> None:
    layout = SequenceLayout.contiguous((0, 1000, 1024 * world_size), world_size)
    shape = (1, 1024, 8, 128)
    leaves = [
        torch.randn(shape, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3)
    ]
    do = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    log_decay = -torch.exp2(-torch.arange(8.0, device="cuda") - 4)

    def layer() -> tuple[Tensor, ...]:
        q, k, v = leaves
        o, _ = state_attention(
            q, k, v, log_decay=log_decay, layout=layout, group=group, check=False
        )
        return (o, *torch.autograd.grad(o, leaves, do))

    layer()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = layer()
    for _ in range(3):
        with torch.no_grad():
            for leaf in leaves:
                leaf.normal_()
        graph.replay()
        for found, expected in zip(captured, layer(), strict=True):
            assert torch.equal(found, expected)


if __name__ == "__main__":
    main()
