"""What a run of new shapes spends host time on that a second run does not.

Kernels that Triton compiles, by its compilation listener; the calls in which cuDNN plans, Triton is
entered, and NCCL connects, timed on the host; what the allocator asked of the driver; and, where
it is asked for, the operators of torch's profiler. Not a benchmark itself.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from seqpar import comm
from seqpar.mesh import GroupPool
from seqpar.ops.softmax_kernels import Cudnn
from seqpar.ops.softmax_packed import FlashPacked

__all__ = ["Run", "Watch", "difference"]

TIMED: tuple[tuple[Any, str], ...] = (
    (Cudnn, "forward"),
    (Cudnn, "backward"),
    (FlashPacked, "forward"),
    (FlashPacked, "backward"),
    (comm, "exchange"),
    (comm, "all_gather"),
    (comm, "all_gather_async"),
    (comm, "all_reduce_sum"),
    (GroupPool, "prepare"),
)


@dataclass
class Run:
    """What one run took, and what happened in it."""

    ms: float = 0.0
    compiled: list[tuple[str, float]] = field(default_factory=list)
    """(kernel, ms) of each compilation; from the cache on disk: with a name that says so."""
    host_ms: dict[str, float] = field(default_factory=dict)
    """By function: time on the host in all its calls."""
    operator_ms: dict[str, float] = field(default_factory=dict)
    """By operator: its own time on the host, all calls; if profiled."""
    allocator: dict[str, int] = field(default_factory=dict)

    @property
    def compile_ms(self) -> float:
        return sum(ms for _, ms in self.compiled)


class Watch:
    """Watches runs on this rank.

    Args:
        cuda: whether there are a compiler and an allocator to watch.
    """

    def __init__(self, *, cuda: bool) -> None:
        self.cuda = cuda
        self._compiled: list[tuple[str, float]] = []
        self._host_ms: dict[str, float] = defaultdict(float)
        for owner, name in TIMED:
            setattr(owner, name, self._timed(getattr(owner, name)))
        if cuda:
            from triton import knobs

            from seqpar.kernels.launch import Launch

            Launch.through_triton = self._timed(Launch.through_triton)  # type: ignore[method-assign]
            knobs.compilation.listener = self._listen

    def __call__(self, run: Callable[[], float], *, profiled: bool = False) -> Run:
        """Watch `run`, which returns its ms."""
        self._compiled, operator_ms = [], {}
        self._host_ms.clear()
        before = self._allocator()
        if profiled:
            with profile(activities=[ProfilerActivity.CPU]) as found:
                ms = run()
            operator_ms = {e.key: e.self_cpu_time_total / 1e3 for e in found.key_averages()}
        else:
            ms = run()
        after = self._allocator()
        changes = {name: after[name] - before[name] for name in after}
        return Run(ms, self._compiled, dict(self._host_ms), operator_ms, changes)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self._host_ms[function.__qualname__] += (time.perf_counter() - start) * 1e3

        return timed

    def _listen(self, *, src: Any, times: Any, cache_hit: bool, **_: object) -> None:
        name = f"{src.name} (from disk)" if cache_hit else str(src.name)
        self._compiled.append((name, times.total / 1e3))

    def _allocator(self) -> dict[str, int]:
        if not self.cuda:
            return {}
        stats = torch.cuda.memory_stats()
        names = ("num_alloc_retries", "num_device_alloc", "num_device_free")
        counted = {name: int(stats.get(name, 0)) for name in names}
        reserved = int(stats.get("reserved_bytes.all.current", 0)) // 2**20
        return {**counted, "reserved_mib": reserved}


def difference(first: Run, second: Run, *, most: int = 6) -> dict[str, Any]:
    """What the first run had that the second had not, times in ms."""
    return {
        "first_ms": first.ms,
        "second_ms": second.ms,
        "compiled": dict(Counter(name for name, _ in first.compiled)),
        "compile_ms": first.compile_ms,
        "second_compiled": len(second.compiled),
        "host_ms_more": _more(first.host_ms, second.host_ms, most),
        "operator_ms": _more(first.operator_ms, second.operator_ms, 2 * most),
        "allocator": first.allocator,
    }


def _more(first: dict[str, float], second: dict[str, float], most: int) -> dict[str, float]:
    more = {name: ms - second.get(name, 0.0) for name, ms in first.items()}
    longest = sorted(more, key=lambda name: -more[name])[:most]
    return {name: round(more[name], 1) for name in longest if more[name] > 1.0}
