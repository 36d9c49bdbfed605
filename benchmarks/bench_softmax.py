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
from torch.distributed import ProcessGroup
from torch.nn.attention import SDPBackend, sdpa_kernel

from seqpar.balance import balanced_layout, imbalance
from seqpar.layout import SequenceLayout
from seqpar.ops.ring import RingAttention
from seqpar.ops.ring_schedule import own_schedule
from seqpar.ops.softmax import softmax_attention
from seqpar.ops.softmax_tiles import Mask, block_tiles

HEADS, HEAD_DIM = 32, 128
SIZES = (16384, 65536)
WINDOW = 4096
BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


class Bench:
    """Times functions on every rank at once (the slowest rank counts); records as it goes."""

    def __init__(self, path: Path) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()

    def ms(self, run: Callable[[], object]) -> float:
        """Median over three rounds of the mean time of a call, the slowest rank's."""
        for _ in range(2):
            run()
        calls = max(1, min(10, int(100 / max(self._round(run, 1), 1e-3))))
        return statistics.median(self._round(run, calls) for _ in range(3))

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
        """Record one row, print it, and write the file anew."""
        self.rows.append({"what": what, **figures})
        if self.rank == 0:
            shown = "  ".join(
                f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()
            )
            print(f"[{time.monotonic() - self.started:5.1f}s] {what:42s} {shown}", flush=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({**_facts(), "rows": self.rows}, indent=1) + "\n")

    def attempt(self, measurement: Callable[..., Any], *args: Any) -> Any:
        """A measurement that fails is a row, not the end of the others."""
        try:
            return measurement(self, *args)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            self.row(f"FAILED {measurement.__name__} {args}"[:60], reason=reason[:300])
            return None


def _facts() -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name(),
        "devices": dist.get_world_size(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        "shape": {"heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
    }


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
    figures = {key: fact() if callable(fact) else fact for key, fact in facts.items()}
    bench.row(what, forward_ms=forward_ms, total_ms=total_ms, **figures)
    return forward_ms, total_ms


def on_ranks(
    layout: SequenceLayout, group: ProcessGroup | None = None, **options: Any
) -> Callable[..., Tensor]:
    """softmax_attention over the group; by default over all ranks."""
    if layout.world_size > 1:
        group = group or dist.group.WORLD

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
    """Every strategy, packed documents with grouped queries, against float64."""
    bounds = (0, 700, 701, 1100, 1536)
    cases = [("ring", None), ("ulysses", None), ("usp", None), ("gather", None), ("auto", None)]
    cases += [("ring", 200), ("halo", 200)]
    for layout in (
        SequenceLayout.zigzag(bounds, bench.size),
        balanced_layout(bounds, bench.size),
    ):
        for causal in (True, False):
            for strategy, window in cases:
                _compare(bench, layout, (8, 4), strategy, causal, window)
    bench.row("all strategies are within 8e-3 of float64", passed=True)


def compare_long(bench: Bench) -> None:
    """One document, large enough for cuDNN's kernels in every block."""
    layout = SequenceLayout.zigzag((0, 4096 * bench.size), bench.size)
    worst = _compare(bench, layout, (2, 1), "ring", True, None)
    alone = SequenceLayout.contiguous((0, 4096 * bench.size), 1)
    one = _compare(bench, alone, (2, 1), "ring", True, None)
    bench.row("one document against float64", ring_error=worst, one_gpu_error=one)


def _compare(
    bench: Bench,
    layout: SequenceLayout,
    heads: tuple[int, int],
    strategy: str,
    causal: bool,
    window: int | None,
) -> float:
    """The largest relative error of out, dq, dk, dv on any rank; raises when it is off."""
    generator = torch.Generator().manual_seed(7)
    streams = [
        torch.randn(1, layout.num_tokens, h, 64, generator=generator).to(
            bench.device, torch.bfloat16
        )
        for h in (heads[0], heads[1], heads[1], heads[0])
    ]
    rank = bench.rank if layout.world_size > 1 else 0
    local = [layout.shard(x, rank) for x in streams]
    leaves = [x.requires_grad_() for x in local[:3]]
    out = on_ranks(layout, strategy=strategy, causal=causal, window=window)(*leaves)
    results = (out, *torch.autograd.grad(out, leaves, local[3]))
    expected = float64_attention(layout.cu_seqlens, streams, causal, window)
    errors = []
    for x, ref in zip(results, expected, strict=True):
        mine = layout.shard(ref, rank)
        errors.append(((x.double() - mine).norm() / mine.norm()).item())
    worst = torch.tensor(max(errors), device=bench.device)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    where = f"{strategy} causal={causal} window={window} {layout.spans}"
    if not worst.item() < 8e-3:
        raise AssertionError(f"relative error {worst.item():.1e}: {where}")
    return float(worst.item())


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
    """The best on one GPU of torch's backends and of ours (all GPUs at once, each alone)."""
    tensors = draw(num_tokens, bench.device)
    found = [
        measure(bench, f"one GPU {num_tokens} torch {name}", sdpa(backend), tensors)
        for name, backend in BACKENDS.items()
        if name == "cudnn"
    ]
    if num_tokens == SIZES[0]:
        alone = on_ranks(SequenceLayout.contiguous((0, num_tokens), 1))
        found.append(measure(bench, f"one GPU {num_tokens} seqpar", alone, tensors))
    return min(forward for forward, _ in found), min(total for _, total in found)


def long_document(bench: Bench, num_tokens: int, one: tuple[float, float]) -> None:
    """One document on all ranks: the ring over a zigzag, other strategies beside it."""
    layout = SequenceLayout.zigzag((0, num_tokens), bench.size)
    tensors = draw(layout.tokens_on(bench.rank), bench.device)
    calls = [("ring", False), ("ring", True), ("ulysses", False)]
    for strategy, check in calls if num_tokens == SIZES[0] else calls[:1]:
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        attend = on_ranks(layout, strategy=strategy, check=check)
        what = f"{bench.size} GPUs {num_tokens} {strategy} check={check}"
        peak = Lazy(held, tensors[0])
        measure(bench, what, attend, tensors, one, peak_in_tensors=peak)
    if num_tokens == SIZES[0]:
        what = f"  its tiles alone, nothing sent {num_tokens}"
        measure(bench, what, tiles_alone(layout, bench.rank), tensors, one)


def limited_nccl(bench: Bench, one: dict[int, tuple[float, float]]) -> None:
    """The ring with NCCL held to a few thread blocks, which attention gains."""
    for max_ctas in (4, 8, 16):
        options = dist.ProcessGroupNCCL.Options()
        options.config.max_ctas = max_ctas
        group = dist.new_group(pg_options=options)
        for num_tokens in SIZES:
            layout = SequenceLayout.zigzag((0, num_tokens), bench.size)
            tensors = draw(layout.tokens_on(bench.rank), bench.device)
            attend = on_ranks(layout, group, strategy="ring", check=False)
            what = f"{bench.size} GPUs {num_tokens} ring, NCCL max_ctas={max_ctas}"
            measure(bench, what, attend, tensors, one[num_tokens])


class Lazy:
    """Peak memory since the start of a measurement, in units of one local tensor."""

    def __init__(self, held: int, tensor: Tensor) -> None:
        self.held, self.bytes = held, tensor.numel() * tensor.element_size()

    def __call__(self) -> float:
        return (torch.cuda.max_memory_allocated() - self.held) / self.bytes


def tiles_alone(layout: SequenceLayout, rank: int) -> Callable[..., Tensor]:
    """The rank's tiles on its own keys: what the ring would take if transfers were free."""
    steps = [block_tiles(layout, layout, rank, other, Mask()) for other in range(layout.world_size)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = q.new_zeros(())
        for tiles in steps:
            schedule = own_schedule(tiles, k.shape[1])
            out = out + RingAttention.apply(q, k, v, schedule, None, HEAD_DIM**-0.5)
        return out

    return attend


def packed_documents(bench: Bench, num_tokens: int) -> None:
    """Lognormal documents: zigzag of the stream, and the balanced layout."""
    bounds = lognormal_bounds(num_tokens)
    tensors = draw(num_tokens, bench.device)
    alone = on_ranks(SequenceLayout.contiguous(bounds, 1))
    what = f"one GPU {num_tokens} in {len(bounds) - 1} documents"
    longest = max(stop - start for start, stop in itertools.pairwise(bounds))
    one = measure(bench, what, alone, tensors, longest=longest)
    for name, strategy, layout in (
        ("balanced", "ring", balanced_layout(bounds, bench.size)),
        ("balanced", "gather", balanced_layout(bounds, bench.size)),
        ("zigzag", "ring", SequenceLayout.zigzag(bounds, bench.size)),
    ):
        local = [layout.shard(x, bench.rank) for x in tensors]
        what = f"{bench.size} GPUs {num_tokens} packed {name} {strategy}"
        attend = on_ranks(layout, strategy=strategy, check=False)
        measure(bench, what, attend, local, one, imbalance=imbalance(layout))


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


def short_rows(bench: Bench) -> None:
    """Where cuDNN begins to pay: short causal calls, and what planning a new shape costs."""
    for num_tokens in (1024, 2048, 4096):
        tensors = draw(num_tokens, bench.device)
        for name, backend in BACKENDS.items():
            torch.cuda.synchronize()
            started = time.monotonic()
            both(sdpa(backend), tensors)[1]()
            torch.cuda.synchronize()
            first_ms = 1e3 * (time.monotonic() - started)
            what = f"one GPU {num_tokens} torch {name}"
            measure(bench, what, sdpa(backend), tensors, first_call_ms=first_ms)


def context_parallel_of_torch(
    bench: Bench, num_tokens: int, backend: str, rotation: str, one: tuple[float, float]
) -> None:
    """torch's own context parallelism (head-tail balanced ring)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    mesh = init_device_mesh("cuda", (bench.size,), mesh_dim_names=("cp",))
    set_rotate_method(rotation)
    q, k, v = (
        torch.randn(1, HEADS, num_tokens, HEAD_DIM, device=bench.device).bfloat16()
        for _ in range(3)
    )
    with (
        sdpa_kernel(BACKENDS[backend]),
        context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2]),
    ):
        tensors = [q, k, v, torch.randn_like(q)]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        what = f"torch context_parallel {num_tokens} {backend} {rotation}"
        measure(bench, what, attend, tensors, one)


def main() -> None:
    """Measure all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/h200-x2"))
    parser.add_argument("--compare-only", action="store_true", help="correctness, no timing")
    arguments = parser.parse_args()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", device_id=device)
    torch.manual_seed(dist.get_rank())
    bench = Bench(arguments.output / "softmax.json")
    if arguments.compare_only:
        compare_with_float64(bench)
        compare_long(bench)
    else:
        bench.attempt(compare_long)
        measure_all(bench)
    dist.destroy_process_group()


def measure_all(bench: Bench) -> None:
    """Every table of docs/softmax.md; what the issue promises comes first."""
    short, long = SIZES
    one = {size: bench.attempt(one_gpu, size) for size in SIZES}
    for size in SIZES:
        bench.attempt(long_document, size, one[size])
    for size in SIZES:
        bench.attempt(context_parallel_of_torch, size, "cudnn", "allgather", one[size])
    bench.attempt(windowed, long)
    bench.attempt(compare_with_float64)
    bench.attempt(limited_nccl, one)
    bench.attempt(packed_documents, long)
    bench.attempt(short_rows)
    bench.attempt(context_parallel_of_torch, short, "cudnn", "alltoall", one[short])
    bench.attempt(context_parallel_of_torch, short, "flash", "allgather", one[short])
    bench.attempt(context_parallel_of_torch, long, "cudnn", "alltoall", one[long])


if __name__ == "__main__":
    main()
