"""How benchmarks/bench_state.py times: forms in turns, eagerly and in CUDA graphs, on all ranks.

Legend: T tokens of one rank, H heads, D key and value dim.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar import comm

__all__ = ["Setup", "Times", "forward_backward", "graphed", "synchronize", "take_turns"]

SAMPLE_MS = 40.0
"""A sample is as many calls back to back as take about this long: a queue that has filled, as in
training, and not one that begins empty."""


@dataclass(frozen=True)
class Setup:
    """Where and what is measured."""

    group: Any
    nccl_group: Any
    """The same ranks, without memory that peers read."""
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    heads: int
    dim: int
    rounds: int

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def stream(self, tokens: int, count: int = 4) -> list[Tensor]:
        """The same [1, tokens, H, D] tensors on every rank, scaled like normalised features."""
        generator = torch.Generator(self.device).manual_seed(7)
        shape = (1, tokens, self.heads, self.dim)
        options = {"generator": generator, "device": self.device}
        return [
            (torch.randn(shape, **options) * self.dim**-0.25).to(self.dtype) for _ in range(count)
        ]

    def slopes(self) -> Tensor:
        """log decay of each head: the ALiBi slopes that lightning models use, negative."""
        steps = torch.arange(1, self.heads + 1, device=self.device)
        return -torch.exp2(-8.0 * steps / self.heads)


def forward_backward(
    output: Callable[[], Tensor], leaves: list[Tensor], do: Tensor
) -> Callable[[], None]:
    def run() -> None:
        torch.autograd.grad(output(), leaves, do)

    return run


@dataclass(frozen=True)
class Times:
    """Medians of one form, of the slowest rank."""

    ms: float
    """From a common start to the device's end."""
    host_ms: float
    """Until the host had queued it; near `ms`, the host is what limits."""


def take_turns(setup: Setup, forms: dict[str, Callable[[], None]]) -> dict[str, Times]:
    """Times of one call of each form, over rounds in which the forms take turns."""
    if not forms:
        return {}
    inner = {}
    for name, form in forms.items():
        for _ in range(2):
            form()
        once = torch.tensor([timed(setup, form, 1)[0]], device=setup.device)
        slowest = float(comm.all_gather(once, setup.group).max())
        inner[name] = max(1, min(60, round(SAMPLE_MS / slowest)))
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for turn in range(setup.rounds):
        for name in _order(list(forms), turn):
            samples[name].append(timed(setup, forms[name], inner[name]))
    medians = [
        [statistics.median(column) for column in zip(*samples[name], strict=True)] for name in forms
    ]
    mine = torch.tensor(medians, device=setup.device)
    slowest_rank = comm.all_gather(mine, setup.group).amax(0).tolist()
    return {name: Times(*pair) for name, pair in zip(forms, slowest_rank, strict=True)}


def _order(names: list[str], turn: int) -> list[str]:
    """Another first form each turn, and every other turn backwards: what ran just before a form,
    and how warm it left the device, is not always the same.
    """
    first = turn // 2 % len(names)
    order = names[first:] + names[:first]
    return order[::-1] if turn % 2 else order


def graphed(setup: Setup, forms: dict[str, Callable[[], None]]) -> dict[str, Callable[[], None]]:
    """Each form as a CUDA graph, so that its time is the device's; those that can be captured."""
    found: dict[str, Callable[[], None]] = {}
    if setup.device.type != "cuda":
        return found
    for name, form in forms.items():
        if name.endswith("checked"):  # to check, the host waits for the device
            continue
        graph, problem = torch.cuda.CUDAGraph(), ""
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                form()
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        synchronize(setup)
        failed = torch.tensor([bool(problem)], device=setup.device)
        if comm.all_gather(failed, setup.group).any():
            setup.say(f"  {name} cannot be captured in a graph: {problem!r}")
        else:
            found[name] = graph.replay
    return found


def timed(setup: Setup, form: Callable[[], None], inner: int) -> tuple[float, float]:
    """(ms, host ms) of one call: `inner` calls back to back, from a common start."""
    dist.barrier(setup.group)
    synchronize(setup)
    start = time.perf_counter()
    for _ in range(inner):
        form()
    queued = time.perf_counter()
    synchronize(setup)
    stop = time.perf_counter()
    return (stop - start) * 1e3 / inner, (queued - start) * 1e3 / inner


def synchronize(setup: Setup) -> None:
    if setup.device.type == "cuda":
        torch.cuda.synchronize()
