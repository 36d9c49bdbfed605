"""Clocks, graphs and a description of one GPU, shared by the kernels' benchmarks."""

from __future__ import annotations

import importlib.util
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

__all__ = ["ROOT", "copy_tb_per_s", "graph_of", "hardware", "host_us", "mean_us", "median_ms"]

ROOT = Path(__file__).resolve().parent.parent


def median_ms(run: Callable[[], Any], budget_ms: float = 60.0) -> float:
    """Median by CUDA events, the level-2 cache flushed between calls."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=10, rep=budget_ms, return_mode="median"))


def mean_us(run: Callable[[], Any], *, replays: int) -> float:
    """Mean of replays one after the other, nothing flushed between them; the median of three."""
    rounds = []
    for _ in range(3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        run()
        start.record()
        for _ in range(replays):
            run()
        end.record()
        torch.cuda.synchronize()
        rounds.append(1e3 * start.elapsed_time(end) / replays)
    return statistics.median(rounds)


def host_us(run: Callable[[], Any], calls: int = 40) -> float:
    """Microseconds of the host for one call, the least of five rounds; the device runs behind."""
    rounds = []
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            run()
        rounds.append((time.perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return min(rounds[1:])


def graph_of(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same launches without their host time."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def copy_tb_per_s() -> float:
    """Bytes read and written by a device copy of 2 GiB, the median of three medians."""
    source = torch.randint(0, 99, (2 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    rates = [2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e9 for _ in range(3)]
    return statistics.median(rates)


def hardware() -> tuple[str, dict[str, Any]]:
    """The folder of results for this GPU, and what was measured on what."""
    import triton

    name = torch.cuda.get_device_name()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    if importlib.util.find_spec("fla"):
        from importlib.metadata import version

        versions["fla-core"] = version("fla-core")
    about = {
        "device": name, "python": platform.python_version(), "versions": versions,
        "commit": os.environ.get("SEQPAR_COMMIT", commit),
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "head_dim": 128, "dtype": "bfloat16",
    }  # fmt: skip
    return name.lower().replace("nvidia ", "").replace(" ", "-"), about
