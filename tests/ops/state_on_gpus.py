"""What only several GPUs can show, for torchrun: `torchrun --nproc-per-node 2 state_on_gpus.py`.

Memory that peers read delivers what NCCL delivers, whatever the order in which ranks arrive,
eagerly and replayed; and a layer captured in a CUDA graph gives what it gives eagerly.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar import comm
from seqpar.layout import SequenceLayout
from seqpar.mesh import GroupPool, init_mesh
from seqpar.ops.state import state_attention

LENGTHS = (4, 64, 4096, 40000, 524288, 1048576)
"""float32 elements of a message: one program, several, and several tiles a program."""


def main() -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    group = init_mesh(sp=world_size)["sp"].get_group()
    pool = GroupPool()
    pool.prepare([tuple(range(world_size))])
    over_nccl = pool.group(range(world_size))
    if comm.share_memory(group):
        _gathers_like_nccl(group, over_nccl)
        _replays_like_nccl(group, over_nccl)
        say("peer memory delivers what NCCL delivers")
    else:
        say("these devices cannot read each other's memory")
    for each in (group, over_nccl):
        _layer_in_a_graph(each, world_size)
    say("a captured layer gives what it gives eagerly")
    pool.close()
    dist.destroy_process_group()


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


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


def _layer_in_a_graph(group: dist.ProcessGroup, world_size: int) -> None:
    layout = SequenceLayout.contiguous((0, 1000, 1024 * world_size), world_size)
    shape = (1, 1024, 8, 64)
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
