"""The ring repeats itself, whoever carries its messages: a rank of `torchrun`, one process a GPU.

    torchrun --nproc-per-node 2 -m tests.ops.softmax_repeats

Blocks long enough for cuDNN, whose forward adds in one order: out must be the same, bit by bit, in
call after call, over NCCL and over copy engines. In deterministic mode dq, dk and dv must be too.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.layout import SequenceLayout
from seqpar.mesh import GroupPool, init_mesh
from seqpar.ops.softmax import softmax_attention

NUM_TOKENS, HEADS, HEAD_DIM = 16384, 32, 128
REPEATS = 10


def main() -> None:
    """Both modes over both layouts; ends with an error where a bit differs."""
    size = int(os.environ["WORLD_SIZE"])
    sharing = init_mesh(sp=size).get_group("sp")
    pool = GroupPool(share_memory=False)
    pool.prepare([tuple(range(size))])
    groups = {"NCCL": pool.group(range(size))}
    if comm.shares_memory(sharing):
        groups["copy engines"] = sharing
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        for name in ("zigzag", "contiguous"):
            layout = getattr(SequenceLayout, name)((0, NUM_TOKENS), size)
            exact = ("out", "dq", "dk", "dv") if deterministic else ("out",)
            _compare(layout, groups, exact, f"{name}, deterministic {deterministic}")
    if dist.get_rank() == 0:
        print(f"the ring repeats itself over {' and '.join(groups)}", flush=True)
    pool.close()
    dist.destroy_process_group()


def _compare(
    layout: SequenceLayout, groups: dict[str, ProcessGroup], exact: tuple[str, ...], what: str
) -> None:
    """All calls against the first one over NCCL: those named in `exact` bit by bit."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    shape = (1, layout.tokens_on(rank), HEADS, HEAD_DIM)
    tensors = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
    expected = _ring(tensors, layout, groups["NCCL"])
    for name, group in groups.items():
        worst = dict.fromkeys(expected, 0.0)
        for _ in range(REPEATS):
            for part, x in _ring(tensors, layout, group).items():
                y = expected[part]
                worst[part] = max(worst[part], 0.0 if torch.equal(x, y) else _relative(x, y))
        found = torch.tensor(list(worst.values()), device="cuda")
        dist.all_reduce(found, dist.ReduceOp.MAX)
        differing = dict(zip(worst, found.tolist(), strict=True))
        if rank == 0:
            shown = ", ".join(f"{part} {error:.1e}" for part, error in differing.items())
            print(f"{what}, over {name}: differ by {shown}", flush=True)
        assert not any(differing[part] for part in exact), (what, name)


def _ring(tensors: list[Tensor], layout: SequenceLayout, group: ProcessGroup) -> dict[str, Tensor]:
    *leaves, dout = (x.detach() for x in tensors)
    for x in leaves:
        x.requires_grad_()
    out = softmax_attention(*leaves, layout=layout, group=group, strategy="ring", check=False)
    grads = torch.autograd.grad(out, leaves, dout)
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def _relative(x: Tensor, y: Tensor) -> float:
    """Above 0 for what is not equal."""
    difference = (x.float() - y.float()).norm() / y.float().norm()
    return max(difference.item(), 1e-30) if difference.isfinite() else torch.inf


if __name__ == "__main__":
    main()
