"""What benchmarks of planned steps share: ranks with a hybrid model, and documents for it.

Not a benchmark itself; `bench_hybrid_plan.py` and `bench_first_runs.py` run on it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist

from seqpar import comm, init_mesh
from seqpar.data import limit_documents
from seqpar.mesh import GroupPool
from seqpar.models import Decoder, DecoderConfig, hybrid
from seqpar.planners import Group, MicroBatch, ScatterPlan
from seqpar.training import PlanExecutor

__all__ = ["HybridJob", "long_tailed", "run_on_ranks"]

MEMORY_SHARE = 0.8
"""Of a device's memory that plans may use: layouts balance tokens to 3%, and an allocator that
fragments gives everything back before it fails, which takes seconds."""

EVERY_LONG = 100
"""One document in so many is 50 times as long as the others."""


def model_config(*, tiny: bool) -> DecoderConfig:
    """Eighteen layers of width 2,048, every fourth softmax: 1.0 billion parameters."""
    return hybrid(
        vocab_size=256 if tiny else 16_384,
        dim=64 if tiny else 2048,
        num_layers=4 if tiny else 18,
        num_heads=4 if tiny else 16,
        hidden=96 if tiny else 5504,
        softmax_every=4,
        softmax_heads=4 if tiny else 16,
        softmax_kv_heads=2 if tiny else 4,
        softmax_head_dim=16 if tiny else 128,
        softmax_strategy="ring",
    )


class HybridJob:
    """One rank of a job: its device, the model, its optimizer and the executor of plans.

    Gradients and Adam's moments exist from the start, as in the middle of a run.
    """

    def __init__(self, *, tiny: bool, layout: Literal["balanced", "zigzag"] = "balanced") -> None:
        self.began = time.perf_counter()
        self.tiny = tiny
        init_mesh(sp=int(os.environ["WORLD_SIZE"]))
        self.world = dist.group.WORLD
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.cuda = "nccl" in dist.get_backend()
        self.device = torch.device("cpu")
        if self.cuda:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.config = model_config(tiny=tiny)
        torch.manual_seed(0)
        with self.device:
            model = Decoder(self.config)
        self.executor = PlanExecutor(
            model,
            GroupPool(),
            world=self.world,
            device=self.device,
            layout=layout,
            autocast=torch.bfloat16 if self.cuda else None,
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=self.cuda)
        self.say(f"{self.parameters / 1e9:.2f} billion parameters on {self.ranks} ranks")
        self._first_step()

    def _first_step(self) -> None:
        groups = tuple(Group((r,), 1, "local", (r,), 1.0, 64) for r in range(self.ranks))
        plan = ScatterPlan((MicroBatch(1.0, groups),))
        self.executor.forward_backward(plan, [torch.arange(64)] * self.ranks)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.executor.model.parameters())

    def memory_bytes(self) -> float:
        """What activations and gradients may take of every device."""
        if not self.cuda:
            return 2.0**28
        total = torch.cuda.get_device_properties(self.device).total_memory
        free = MEMORY_SHARE * total - torch.cuda.memory_allocated()
        of_ranks = comm.all_gather(torch.tensor(free, device=self.device), self.world)
        return of_ranks.min().item()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def is_past(self, seconds: float) -> bool:
        """Whether rank 0 has been at it for so long; the same on every rank."""
        return bool(comm.broadcast_object(self.seconds > seconds, self.world))

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{self.seconds:5.1f} s] {text}", flush=True)

    def close(self) -> None:
        self.executor.pool.close()
        dist.destroy_process_group()


def long_tailed(
    config: DecoderConfig, *, median: int, context_tokens: int, seed: int
) -> list[torch.Tensor]:
    """600 documents of lognormal lengths, one in a hundred 50 times as long; split by context."""
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(math.log(median), 1.3, 600)
    lengths[::EVERY_LONG] *= 50
    whole = [
        torch.from_numpy(rng.integers(config.vocab_size, size=max(2, int(n)))) for n in lengths
    ]
    return limit_documents(whole, context_tokens=context_tokens, over_limit="split")


class Bench(Protocol):
    """One rank's part of a benchmark: its results hold a `summary`."""

    job: HybridJob

    def run(self) -> dict[str, Any]: ...


def run_on_ranks(script: Path, out: Path, make: Callable[[], Bench], *, ranks: int = 2) -> None:
    """Run the script once more on ranks of its own; there, the benchmark: write and print."""
    if not dist.is_torchelastic_launched():
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        environment = {
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
            "OMP_NUM_THREADS": "1",
        }
        subprocess.run(
            [sys.executable, *command, str(script), *sys.argv[1:]],
            env=os.environ | environment,
            check=True,
        )
        return
    bench = make()
    results = bench.run()
    if bench.job.rank == 0:
        out.write_text(json.dumps(results, indent=1) + "\n")
        print(json.dumps(results["summary"], indent=1), flush=True)
    bench.job.close()
