"""Softmax sequence parallelism against one device and against torch's context parallelism.

    torchrun --nproc-per-node 2 -m benchmarks.bench_softmax --output benchmarks/results/h200-x2

One process a GPU. Efficiency is one GPU's time with its best backend over (W x time), both
measured in the same round of one table, several rounds; forward and forward + backward, bfloat16,
H = 32 heads of D = 128. One GPU's time is taken on all GPUs at once, and the slowest one's counts,
as in every row; `benchmarks.rank_timing` says what else is recorded. Writes softmax.json into the
output folder. That the results are right is tested by tests/ops/test_softmax_multigpu.py.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.rank_timing import Recorder, Row, Sample
from seqpar import comm
from seqpar.balance import balanced_layout, imbalance
from seqpar.layout import SequenceLayout
from seqpar.mesh import GroupPool, init_mesh
from seqpar.ops.ring import RingAttention
from seqpar.ops.ring_schedule import own_schedule
from seqpar.ops.softmax import softmax_attention
from seqpar.ops.softmax_tiles import Mask, block_tiles

HEADS, HEAD_DIM = 32, 128
SIZES = (16384, 65536)
WINDOW = 4096
LONG_ROUNDS = 9  # the goals are a few thousandths off, and one round's efficiency scatters by six
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def main() -> None:
    """Measure all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/h200-x2"))
    arguments = parser.parse_args()
    size = int(os.environ["WORLD_SIZE"])
    group = init_mesh(sp=size).get_group("sp")
    pool = GroupPool(share_memory=False)
    pool.prepare([tuple(range(size))])
    over_nccl = pool.group(range(size))
    torch.manual_seed(dist.get_rank())
    recorder = Recorder(arguments.output / "softmax.json", _facts(group))
    one = {size: recorder.attempt(long_document, size, group, over_nccl) for size in SIZES}
    for size in SIZES:
        recorder.attempt(context_parallel_of_torch, size, "cudnn", "allgather", one[size])
    recorder.attempt(windowed, SIZES[1], group)
    recorder.attempt(packed_documents, SIZES[1], group)
    recorder.attempt(short_documents)
    for size in SIZES:
        recorder.attempt(context_parallel_of_torch, size, "cudnn", "alltoall", one[size])
    pool.close()
    dist.destroy_process_group()


def _facts(group: ProcessGroup) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(),
        "devices": dist.get_world_size(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "ring_by": "copy engines" if comm.shares_memory(group) else "NCCL",
        "shape": {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
    }


# -- what is measured -------------------------------------------------------------------------


def long_document(
    recorder: Recorder, num_tokens: int, group: ProcessGroup, over_nccl: ProcessGroup
) -> tuple[Sample, Sample]:
    """One document on all ranks: the ring over a zigzag, and other strategies beside it.

    `group` shares memory where its devices can, `over_nccl` does not.
    """
    layout = SequenceLayout.zigzag((0, num_tokens), recorder.size)
    whole, local = draw(num_tokens), draw(layout.tokens_on(recorder.rank))
    best = sdpa(SDPBackend.CUDNN_ATTENTION)
    rows = [Row(f"one GPU {num_tokens} torch cudnn", best, whole, on_one_gpu=True)]
    for what, strategy, members in (
        ("ring", "ring", group),
        ("ring over NCCL", "ring", over_nccl),
        ("ulysses", "ulysses", group),
    ):
        attend = on_ranks(layout, members, strategy=strategy, check=False)
        rows.append(Row(f"{num_tokens} {what} check=False", attend, local))
    what = f"{num_tokens} the ring's tiles alone, nothing sent"
    rows.append(Row(what, tiles_alone(layout, recorder.rank), local))
    if num_tokens == SIZES[0]:
        checked = on_ranks(layout, group, strategy="ring", check=True)
        rows.append(Row(f"{num_tokens} ring check=True", checked, local))
        alone = on_ranks(SequenceLayout.contiguous((0, num_tokens), 1))
        rows.append(Row(f"one GPU {num_tokens} seqpar", alone, whole, on_one_gpu=True))
    return recorder.table(rows, rounds=LONG_ROUNDS)


def packed_documents(recorder: Recorder, num_tokens: int, group: ProcessGroup) -> None:
    """Lognormal documents: the balanced layout, and a zigzag of the stream."""
    bounds = lognormal_bounds(num_tokens)
    longest = max(stop - start for start, stop in itertools.pairwise(bounds))
    what = f"one GPU {num_tokens} in {len(bounds) - 1} documents"
    whole = draw(num_tokens)
    alone = on_ranks(SequenceLayout.contiguous(bounds, 1))
    rows = [Row(what, alone, whole, {"longest": longest}, on_one_gpu=True)]
    for name, strategy, layout in (
        ("balanced", "ring", balanced_layout(bounds, recorder.size)),
        ("balanced", "gather", balanced_layout(bounds, recorder.size)),
        ("zigzag", "ring", SequenceLayout.zigzag(bounds, recorder.size)),
    ):
        local = [layout.shard(x, recorder.rank) for x in whole]
        attend = on_ranks(layout, group, strategy=strategy, check=False)
        facts = {"imbalance": imbalance(layout)}
        rows.append(Row(f"{num_tokens} packed {name} {strategy}", attend, local, facts))
    recorder.table(rows)


def windowed(recorder: Recorder, num_tokens: int, group: ProcessGroup) -> None:
    """A sliding window over one document, on four layouts."""
    bounds, size = (0, num_tokens), recorder.size
    whole = draw(num_tokens)
    alone = on_ranks(SequenceLayout.contiguous(bounds, 1), window=WINDOW)
    rows = [Row(f"one GPU {num_tokens} window {WINDOW}", alone, whole, on_one_gpu=True)]
    of_attention = balanced_layout(bounds, size, window=WINDOW, attention_share=0.95)
    for name, layout in (
        ("balanced for attention", of_attention),
        ("balanced", balanced_layout(bounds, size, window=WINDOW)),
        ("contiguous", SequenceLayout.contiguous(bounds, size)),
        ("zigzag", SequenceLayout.zigzag(bounds, size)),
    ):
        local = [layout.shard(x, recorder.rank) for x in whole]
        attend = on_ranks(layout, group, strategy="halo", window=WINDOW, check=False)
        facts = {"imbalance": imbalance(layout, window=WINDOW)}
        rows.append(Row(f"{num_tokens} window {WINDOW} halo {name}", attend, local, facts))
    recorder.table(rows, rounds=LONG_ROUNDS)


def short_documents(recorder: Recorder) -> None:
    """Where cuDNN begins to pay: short causal calls, and what planning a new shape costs."""
    for num_tokens in (1024, 2048, 4096):
        tensors = draw(num_tokens)
        rows = []
        for name, backend in BACKENDS.items():
            what = f"one GPU {num_tokens} torch {name}"
            row = Row(what, sdpa(backend), tensors, on_one_gpu=True)
            torch.cuda.synchronize()
            started = time.monotonic()
            row.calls()[1]()
            torch.cuda.synchronize()
            row.facts["first_call_ms"] = 1e3 * (time.monotonic() - started)
            rows.append(row)
        recorder.table(rows)


def context_parallel_of_torch(
    recorder: Recorder, num_tokens: int, backend: str, rotation: str, one: tuple[Sample, Sample]
) -> None:
    """torch's own context parallelism (head-tail balanced ring)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    mesh = init_device_mesh("cuda", (recorder.size,), mesh_dim_names=("cp",))
    set_rotate_method(rotation)
    q, k, v = (x.transpose(1, 2).contiguous() for x in draw(num_tokens)[:3])
    with (
        sdpa_kernel(BACKENDS[backend]),
        context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]),
    ):

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        what = f"{num_tokens} torch context_parallel {backend} {rotation}"
        recorder.table([Row(what, attend, [q, k, v, torch.randn_like(q)])], alone=one)


# -- attention, documents, tensors ------------------------------------------------------------


def on_ranks(
    layout: SequenceLayout, group: ProcessGroup | None = None, **options: Any
) -> Callable[..., Tensor]:
    """softmax_attention over the group."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return softmax_attention(q, k, v, layout=layout, group=group, **options)

    return attend


def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
    """torch's own attention on one GPU."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attend


def tiles_alone(layout: SequenceLayout, rank: int) -> Callable[..., Tensor]:
    """The rank's tiles on its own keys: what the ring would take if transfers were free."""
    world = range(layout.world_size)
    tiles = [t for other in world for t in block_tiles(layout, layout, rank, other, Mask())]
    schedule = own_schedule(tuple(tiles), layout.tokens_on(rank))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = RingAttention.apply(q, k, v, schedule, None, HEAD_DIM**-0.5)
        return out

    return attend


def draw(num_tokens: int) -> list[Tensor]:
    """q, k, v, dout: [1, num_tokens, H, D] bfloat16."""
    shape = (1, num_tokens, HEADS, HEAD_DIM)
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)]


def lognormal_bounds(num_tokens: int, seed: int = 1) -> list[int]:
    """Document bounds: lengths lognormal, median 2000 tokens, sigma 1.2, the last one cut."""
    draws, bounds = random.Random(seed), [0]
    while bounds[-1] < num_tokens:
        length = max(16, int(draws.lognormvariate(math.log(2000), 1.2)))
        bounds.append(min(num_tokens, bounds[-1] + length))
    return bounds


if __name__ == "__main__":
    main()
