"""Every strategy over NCCL in bfloat16 (and two in float16) against float64, a rank of `torchrun`.

    torchrun --nproc-per-node 2 -m tests.ops.softmax_over_nccl

Each over a group that moves everything by NCCL, and over one that shares memory where devices can.
Prints the worst relative error of each case; ends with an error if one is beyond the tolerance.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from seqpar.balance import balanced_layout
from seqpar.layout import SequenceLayout
from seqpar.mesh import GroupPool, init_mesh
from seqpar.ops.softmax import softmax_attention
from tests.ops.softmax_cases import Case, device_of
from tests.ops.softmax_reference import reference, visible
from tests.tolerances import RELATIVE, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # over gloo, to try the script out


def main() -> None:
    """Compare all cases; the same on every rank."""
    world_size = int(os.environ["WORLD_SIZE"])
    sharing = init_mesh(sp=world_size).get_group("sp")
    pool = GroupPool(share_memory=False)
    pool.prepare([tuple(range(world_size))])
    groups = [sharing, pool.group(range(world_size))]
    for case in _cases(world_size):
        worst = torch.tensor(_worst_error(case, groups), device=DEVICE)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        if dist.get_rank() == 0:
            print(f"{worst.item():.1e} {case}", flush=True)
        assert worst.item() <= RELATIVE[case.dtype], case
    if dist.get_rank() == 0:
        print("all strategies are within the tolerance", flush=True)
    pool.close()
    dist.destroy_process_group()


def _cases(world_size: int) -> Iterator[Case]:
    bounds = (0, 700, 701, 1100, 1536)
    sizes = {"heads": 8, "kv_heads": 4, "key_dim": 64, "value_dim": 64, "dtype": torch.bfloat16}
    masks = [(True, None), (False, None), (True, 200), (False, 200)]
    for layout in (
        SequenceLayout.zigzag(bounds, world_size),
        balanced_layout(bounds, world_size),
        balanced_layout(bounds, world_size, window=200),
    ):
        for causal, window in masks:
            for strategy in ("ring", "ulysses", "usp", "gather", "auto"):
                yield Case(layout, strategy, causal=causal, window=window, **sizes)
    # Long enough for cuDNN's kernels in every block.
    long = SequenceLayout.zigzag((0, 4096 * world_size), world_size)
    for dtype, late in ((torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, True)):
        yield Case(long, **{**sizes, "heads": 32, "kv_heads": 8, "dtype": dtype}, late=late)
    short = SequenceLayout.zigzag(bounds, world_size)
    for causal, window in masks:
        yield Case(short, "ring", causal=causal, window=window, late=True, **sizes)
    yield Case(short, "ulysses", **{**sizes, "dtype": torch.float16})


def _worst_error(case: Case, groups: Sequence[dist.ProcessGroup]) -> float:
    """The largest relative error of out, dq, dk, dv on this rank, over any of the groups."""
    rank = dist.get_rank()
    streams = [x.to(DEVICE) for x in case.streams()]
    expected = [case.layout.shard(x, rank) for x in _expected(case, streams)]
    errors = [
        relative_error(x, ref)
        for group in groups
        for x, ref in zip(_results(case, streams, group), expected, strict=True)
    ]
    return max(errors)


def _results(
    case: Case, streams: list[torch.Tensor], group: dist.ProcessGroup
) -> tuple[torch.Tensor, ...]:
    """out, dq, dk, dv of this rank."""
    q, k, v, dout = (case.layout.shard(x, dist.get_rank(group)) for x in streams)
    for x in (q, k, v):
        x.requires_grad_()
    with device_of(case):
        out = softmax_attention(
            q, k, v, layout=case.layout, group=group, strategy=case.strategy, causal=case.causal,
            window=case.window,
        )  # fmt: skip
        return (out, *torch.autograd.grad(out, (q, k, v), dout))


def _expected(case: Case, streams: list[torch.Tensor]) -> list[torch.Tensor]:
    """out, dq, dk, dv of the whole stream, one key/value head's queries at a time."""
    sees = visible(case.layout.cu_seqlens, causal=case.causal, window=case.window).to(DEVICE)
    per_group = case.heads // case.kv_heads
    by_head = []
    for head in range(case.kv_heads):
        rows = slice(head * per_group, (head + 1) * per_group)
        q, dout = (x[:, :, rows] for x in (streams[0], streams[3]))
        k, v = (x[:, :, head : head + 1] for x in streams[1:3])
        by_head.append(reference(q, k, v, dout, sees, case.key_dim**-0.5))
    return [torch.cat(parts, 2) for parts in zip(*by_head, strict=True)]


if __name__ == "__main__":
    main()
