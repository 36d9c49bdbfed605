"""Exchange by copy engines against NCCL, for one rank of torchrun, one process a GPU.

    torchrun --nproc-per-node 2 -m tests.exchange_on_gpus [absent]

Messages of any sizes between random pairs, several exchanges under way at once, either rank late;
then the ring, forward and backward, in deterministic mode: both must agree bit by bit. With
`absent` the last rank does not come to an exchange: the others' processes must end by themselves.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.layout import SequenceLayout
from seqpar.mesh import GroupPool, init_mesh
from seqpar.ops.softmax import softmax_attention

INBOX_BYTES = 4 * 2**20
LATE_CYCLES = 3_000_000  # 1.5 ms
LIMIT_S = 60
ABSENT_LIMIT_S = 8
STARTED = time.monotonic()


def main() -> None:
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    faulthandler.register(signal.SIGTERM, chain=True)  # or the launcher's time limit says nothing
    if sys.argv[1:]:
        {"absent": _absent, "waits": _waits}[sys.argv[1]]()
        return
    size = int(os.environ["WORLD_SIZE"])
    direct = init_mesh(sp=size).get_group("sp")
    pool = GroupPool(share_memory=False)
    pool.prepare([tuple(range(size))])
    over_nccl = pool.group(range(size))
    say("groups made")
    if comm.shares_memory(direct):
        comm.make_room(direct, INBOX_BYTES)
        _messages(direct, over_nccl)
        say("copy engines deliver what NCCL delivers")
        torch.use_deterministic_algorithms(True)
        _rings(direct, over_nccl)
        say("the ring over copy engines repeats the ring over NCCL bit by bit")
    else:
        say("these devices cannot write each other's memory")
    pool.close()
    dist.destroy_process_group()


def _absent() -> None:
    """Every rank but the last posts an exchange in a process of its own, which must end itself."""
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.exchange_on_gpus", "waits"]
    done = subprocess.run(command, timeout=LIMIT_S - 10, check=False)
    took = time.monotonic() - began
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        return
    assert done.returncode == -signal.SIGABRT, done.returncode
    print(
        f"a process that waits for a rank that does not come ended after {took:.1f} s", flush=True
    )


def _waits() -> None:
    size = int(os.environ["WORLD_SIZE"])
    limit = timedelta(seconds=ABSENT_LIMIT_S)
    group = init_mesh(sp=size, timeout=limit).get_group("sp")
    comm.make_room(group, INBOX_BYTES)
    rank, last = dist.get_rank(), size - 1
    say("room made")
    if rank == last:
        time.sleep(2 * ABSENT_LIMIT_S)
        os._exit(0)
    own = torch.ones(1000, device="cuda")
    pending = comm.exchange([(last, own)], [(last, own.clone())], group, beside_work=True)
    print(pending.wait()[0].sum().item(), "arrived from nobody", flush=True)


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(f"{time.monotonic() - STARTED:5.1f} s  {text}", flush=True)


def _messages(direct: ProcessGroup, over_nccl: ProcessGroup) -> None:
    draws = random.Random(0)  # the same on every rank
    rank, size = dist.get_rank(), dist.get_world_size()
    for turn in range(60):
        sizes = {
            (a, b): [draws.choice((0, 1, 255, 4096, 1_000_003, 3_000_000)) for _ in range(2)]
            for a in range(size)
            for b in range(size)
            if a != b and draws.random() < 0.8
        }
        if draws.random() < 0.7:
            late = draws.randrange(size)
            if late == rank:
                torch.cuda._sleep(LATE_CYCLES)
        # Two messages of 3,000,000 bytes do not fit: those go over NCCL.
        sends = [
            (b, torch.randint(256, (n,), dtype=torch.uint8, device="cuda"))
            for (a, b), each in sizes.items()
            if a == rank
            for n in each
        ]
        pending = [_exchanged(sends, sizes, group) for group in (direct, direct, over_nccl)]
        first, again, expected = (each.wait() for each in pending)
        for x, y, z in zip(first, again, expected, strict=True):
            assert torch.equal(x, z), turn
            assert torch.equal(y, z), turn
        if turn % 20 == 0:
            say(f"messages, turn {turn}")


def _exchanged(
    sends: list[tuple[int, Tensor]], sizes: dict[tuple[int, int], list[int]], group: ProcessGroup
) -> comm.Pending[list[Tensor]]:
    """Into fresh memory that holds other bytes; what was sent is overwritten after the wait."""
    recvs = [
        (a, torch.full((n,), 77, dtype=torch.uint8, device="cuda"))
        for (a, b), each in sizes.items()
        if b == dist.get_rank()
        for n in each
    ]
    copies = [(peer, x.clone()) for peer, x in sends]
    return comm.exchange(copies, recvs, group, beside_work=True)


def _rings(direct: ProcessGroup, over_nccl: ProcessGroup) -> None:
    size = dist.get_world_size()
    bounds = (0, 700, 701, 2900, 4096)
    for turn, layout in enumerate(
        [
            SequenceLayout.zigzag((0, 4096), size),
            SequenceLayout.zigzag(bounds, size),
            SequenceLayout.contiguous((0, 4096), size),
        ]
        * 4
    ):
        torch.manual_seed(turn)
        q, k, v, dout = (
            torch.randn(1, layout.num_tokens, heads, 128, device="cuda", dtype=torch.bfloat16)
            for heads in (8, 8, 8, 8)  # larger blocks than the room that was made
        )
        late = turn % (size + 1) == dist.get_rank()
        found, expected = (
            _ring([layout.shard(x, dist.get_rank()) for x in (q, k, v, dout)], layout, group, late)
            for group in (direct, over_nccl)
        )
        for what, x, y in zip(("out", "dq", "dk", "dv"), found, expected, strict=True):
            assert torch.equal(x, y), (turn, what, (x - y).abs().max().item())
        say(f"rings, turn {turn}")


def _ring(
    tensors: list[Tensor], layout: SequenceLayout, group: ProcessGroup, late: bool
) -> list[Tensor]:
    """out, dq, dk, dv of three layers, each of which reuses memory that the last one freed."""
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for _ in range(3):
        if late:
            torch.cuda._sleep(LATE_CYCLES)
        out = softmax_attention(*leaves, layout=layout, group=group, strategy="ring", check=False)
        if late:
            torch.cuda._sleep(LATE_CYCLES)
        grads = torch.autograd.grad(out, leaves, dout)
    return [out.detach(), *grads]


if __name__ == "__main__":
    main()
