"""Softmax sequence parallelism against one device and against torch's context parallelism.

    torchrun --nproc-per-node 2 benchmarks/bench_softmax.py --output benchmarks/results/h200-x2

One process a GPU. Efficiency is one GPU's time with its best backend over (W x time), both measured
here; forward and forward + backward, bfloat16, H = 32 heads of D = 128. First every strategy is
compared with float64 on a small stream. Writes softmax.json into the output folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqpar.balance import balanced_layout, imbalance
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax import softmax_attention

HEADS, HEAD_DIM = 32, 128
SIZES = (16384, 65536)
WINDOW = 4096
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Bench:
    """Times functions on every rank at once; the slowest rank counts."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()

    def ms(self, run: Callable[[], object], *, budget_ms: float = 600.0) -> float:
        """Median over rounds of the mean time of a call, the slowest rank's."""
        for _ in range(3):
            run()
        once = self._round(run, 1)
        calls = max(1, min(20, int(budget_ms / 5 / max(once, 1e-3))))
        return statistics.median(self._round(run, calls) for _ in range(5))

    def _round(self, run: Callable[[], object], calls: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        torch.cuda.synchronize()
        slowest = torch.tensor(start.elapsed_time(stop) / calls, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return float(slowest.item())

    def row(self, what: str, **figures: Any) -> None:
        """Record and print one row."""
        self.rows.append({"what": what, **figures})
        if self.rank == 0:
            shown = "  ".join(
                f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()
            )
            print(f"[{time.monotonic() - self.started:6.1f}s] {what:44s} {shown}", flush=True)


def draw(num_tokens: int, device: torch.device, *, heads: int = HEADS) -> list[Tensor]:
    """q, k, v, dout: [1, num_tokens, heads, D] bfloat16."""
    return [
        torch.randn(1, num_tokens, heads, HEAD_DIM, device=device, dtype=torch.bfloat16)
        for _ in range(4)
    ]


def both(attend: Callable[..., Tensor], tensors: list[Tensor]) -> list[Callable[[], None]]:
    """A forward call, and a forward + backward call."""
    q, k, v, dout = tensors
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v)

    def forward_backward() -> None:
        torch.autograd.grad(attend(*leaves), leaves, dout)

    return [forward, forward_backward]


def measure(
    bench: Bench,
    what: str,
    attend: Callable[..., Tensor],
    tensors: list[Tensor],
    one: tuple[float, float] | None = None,
    **facts: Any,
) -> tuple[float, float]:
    """Time forward and forward + backward; with `one`, the efficiency against one GPU."""
    forward_ms, total_ms = (bench.ms(run) for run in both(attend, tensors))
    if one is not None:
        facts["forward_efficiency"] = one[0] / (bench.size * forward_ms)
        facts["efficiency"] = one[1] / (bench.size * total_ms)
    bench.row(what, forward_ms=forward_ms, total_ms=total_ms, **facts)
    return forward_ms, total_ms


def on_ranks(layout: SequenceLayout, **options: Any) -> Callable[..., Tensor]:
    """softmax_attention over the whole group."""
    group = dist.group.WORLD if layout.world_size > 1 else None

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


def lognormal_bounds(num_tokens: int, seed: int = 1) -> list[int]:
    """Document bounds: lengths lognormal, median 2000 tokens, sigma 1.2, the last one cut."""
    draws, bounds = random.Random(seed), [0]
    while bounds[-1] < num_tokens:
        length = max(16, int(draws.lognormvariate(math.log(2000), 1.2)))
        bounds.append(min(num_tokens, bounds[-1] + length))
    return bounds


# -- correctness ------------------------------------------------------------------------------


def compare_with_float64(bench: Bench) -> None:
    """Every strategy, 1,536 tokens in documents, GQA, against float64; raises when it is off."""
    bounds = (0, 700, 701, 1100, 1536)
    generator = torch.Generator().manual_seed(7)
    streams = [
        torch.randn(1, bounds[-1], h, 64, generator=generator).to(bench.device, torch.bfloat16)
        for h in (8, 4, 4, 8)
    ]
    cases = [("ring", None), ("ulysses", None), ("usp", None), ("gather", None), ("halo", 200)]
    cases += [("ring", 200), ("auto", None)]
    for layout in (
        SequenceLayout.zigzag(bounds, bench.size),
        SequenceLayout.contiguous(bounds, bench.size),
        balanced_layout(bounds, bench.size),
        SequenceLayout.zigzag((0, bounds[-1]), bench.size),
    ):
        for causal in (True, False):
            for strategy, window in cases:
                expected = float64_attention(layout.cu_seqlens, streams, causal, window)
                local = [layout.shard(x, bench.rank) for x in streams]
                leaves = [x.requires_grad_() for x in local[:3]]
                out = on_ranks(layout, strategy=strategy, causal=causal, window=window)(*leaves)
                grads = torch.autograd.grad(out, leaves, local[3])
                errors = []
                for x, ref in zip((out, *grads), expected, strict=True):
                    mine = layout.shard(ref, bench.rank)
                    errors.append(((x.double() - mine).norm() / mine.norm()).item())
                worst = torch.tensor(max(errors), device=bench.device)
                dist.all_reduce(worst, dist.ReduceOp.MAX)
                where = f"{strategy} causal={causal} window={window} {layout.spans}"
                assert worst.item() < 8e-3, f"relative error {worst.item():.1e}: {where}"
    bench.row("all strategies against float64", worst_allowed=8e-3, passed=True)


def float64_attention(
    cu_seqlens: tuple[int, ...], streams: list[Tensor], causal: bool, window: int | None
) -> list[Tensor]:
    """out, dq, dk, dv of the whole stream."""
    q, k, v = (x.double().requires_grad_() for x in streams[:3])
    keys, values = (x.repeat_interleave(q.shape[2] // k.shape[2], 2) for x in (k, v))
    position = torch.arange(cu_seqlens[-1], device=q.device)
    document = torch.bucketize(position, torch.tensor(cu_seqlens, device=q.device), right=True)
    distance = position[:, None] - position
    sees = document[:, None] == document
    if causal:
        sees &= distance >= 0
    if window is not None:
        sees &= distance.abs() < window
    scores = torch.einsum("bihk,bjhk->bhij", q, keys) * q.shape[-1] ** -0.5
    out = torch.einsum("bhij,bjhv->bihv", scores.masked_fill(~sees, -torch.inf).softmax(-1), values)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), streams[3].double())]


# -- measurements -----------------------------------------------------------------------------


def one_gpu(bench: Bench, num_tokens: int) -> tuple[float, float]:
    """The best of torch's backends on one GPU (all GPUs run it at once, each alone)."""
    best = (math.inf, math.inf)
    tensors = draw(num_tokens, bench.device)
    for name, backend in BACKENDS.items():
        times = measure(bench, f"one GPU {num_tokens} {name}", sdpa(backend), tensors)
        best = min(best, times, key=lambda pair: pair[1])
    alone = on_ranks(SequenceLayout.contiguous((0, num_tokens), 1))
    return min(best, measure(bench, f"one GPU {num_tokens} seqpar", alone, tensors))


def long_document(bench: Bench, num_tokens: int, one: tuple[float, float]) -> None:
    """One document on all ranks: the ring over a zigzag, and Ulysses."""
    layout = SequenceLayout.zigzag((0, num_tokens), bench.size)
    tensors = draw(layout.tokens_on(bench.rank), bench.device)
    for options in (
        {"strategy": "ring", "check": False},
        {"strategy": "ring"},
        {"strategy": "gather", "check": False},
        {"strategy": "ulysses", "check": False},
    ):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        what = f"{bench.size} GPUs {num_tokens} {options}"
        measure(bench, what, on_ranks(layout, **options), tensors, one)
        peak = torch.cuda.max_memory_allocated() - held
        block = tensors[0].numel() * tensors[0].element_size()
        bench.row(f"  peak memory above q, k, v, dout {num_tokens}", in_tensors=peak / block)


def packed_documents(bench: Bench, num_tokens: int, unpacked: tuple[float, float]) -> None:
    """Lognormal documents: zigzag of the stream, and the balanced layout."""
    bounds = lognormal_bounds(num_tokens)
    tensors = draw(num_tokens, bench.device)
    alone = on_ranks(SequenceLayout.contiguous(bounds, 1))
    what = f"one GPU {num_tokens} in {len(bounds) - 1} documents"
    longest = max(stop - start for start, stop in itertools.pairwise(bounds))
    one = measure(bench, what, alone, tensors, longest=longest)
    for name, layout in (
        ("balanced", balanced_layout(bounds, bench.size)),
        ("zigzag", SequenceLayout.zigzag(bounds, bench.size)),
    ):
        local = [layout.shard(x, bench.rank) for x in tensors]
        for strategy in ("ring", "gather"):
            measure(
                bench,
                f"{bench.size} GPUs {num_tokens} packed {name} {strategy}",
                on_ranks(layout, strategy=strategy, check=False),
                local,
                one,
                imbalance=imbalance(layout),
            )


def windowed(bench: Bench, num_tokens: int) -> None:
    """A sliding window over one document: halo on contiguous and on zigzag spans."""
    tensors = draw(num_tokens, bench.device)
    alone = on_ranks(SequenceLayout.contiguous((0, num_tokens), 1), window=WINDOW)
    one = measure(bench, f"one GPU {num_tokens} window {WINDOW}", alone, tensors)
    for name, layout in (
        ("contiguous", SequenceLayout.contiguous((0, num_tokens), bench.size)),
        ("zigzag", SequenceLayout.zigzag((0, num_tokens), bench.size)),
    ):
        local = [layout.shard(x, bench.rank) for x in tensors]
        attend = on_ranks(layout, strategy="halo", window=WINDOW, check=False)
        measure(bench, f"{bench.size} GPUs window {WINDOW} halo {name}", attend, local, one)


def context_parallel_of_torch(bench: Bench, num_tokens: int, one: tuple[float, float]) -> None:
    """torch's own context parallelism (head-tail balanced ring), with each of its settings."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    mesh = init_device_mesh("cuda", (bench.size,), mesh_dim_names=("cp",))
    for rotation in ("allgather", "alltoall"):
        for name, backend in BACKENDS.items():
            set_rotate_method(rotation)
            q, k, v = (
                torch.randn(1, HEADS, num_tokens, HEAD_DIM, device=bench.device).bfloat16()
                for _ in range(3)
            )
            with (
                sdpa_kernel(backend),
                context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]),
            ):
                tensors = [q, k, v, torch.randn_like(q)]

                def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

                what = f"torch context_parallel {num_tokens} {name} {rotation}"
                try:
                    measure(bench, what, attend, tensors, one)
                except RuntimeError as error:  # a setting that this torch cannot run
                    bench.row(what, failed=str(error)[:120])


def main() -> None:
    """Measure all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/h200-x2"))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--compare-only", action="store_true", help="correctness, no timing")
    arguments = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    torch.manual_seed(dist.get_rank())
    bench = Bench()
    compare_with_float64(bench)
    if arguments.compare_only:
        dist.destroy_process_group()
        return
    one = {size: one_gpu(bench, size) for size in arguments.sizes}
    for size in arguments.sizes:
        long_document(bench, size, one[size])
    packed_documents(bench, max(arguments.sizes), one[max(arguments.sizes)])
    windowed(bench, max(arguments.sizes))
    for size in arguments.sizes:
        context_parallel_of_torch(bench, size, one[size])
    if bench.rank == 0:
        facts = {
            "device": torch.cuda.get_device_name(),
            "devices": bench.size,
            "torch": torch.__version__,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
            "shape": {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        }
        arguments.output.mkdir(parents=True, exist_ok=True)
        path = arguments.output / "softmax.json"
        path.write_text(json.dumps({**facts, "rows": bench.rows}, indent=1) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
