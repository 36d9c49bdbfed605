"""Times on every rank at once: the slowest rank counts, and what is compared takes turns.

A row is one thing to time: a forward call and a forward + backward call of the same attention. Rows
of one table are timed in turn, round after round, so that a clock that changes changes all of them,
and in another order each round, because the clock of a device at its power limit depends on what
ran before.
A sample is the mean of calls that follow on one another, as layers do, for SAMPLE_MS together and
LEAST_CALLS at least; a time is the median over rounds. An efficiency is made of samples of one
round, and its median, least and largest are recorded.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

SAMPLE_MS = 60.0
LEAST_CALLS = 3
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """An attention of q, k, v, its operands q, k, v, dout on this rank, and facts to record."""

    what: str
    attend: Callable[..., Tensor]
    tensors: Sequence[Tensor]
    facts: dict[str, Any] = field(default_factory=dict)
    on_one_gpu: bool = False
    """Every GPU does all of it alone: it has no efficiency."""

    def calls(self) -> list[Callable[[], None]]:
        """A forward call, and a forward + backward call."""
        q, k, v, dout = self.tensors
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]

        def forward() -> None:
            with torch.no_grad():
                self.attend(q, k, v)

        def forward_backward() -> None:
            torch.autograd.grad(self.attend(*leaves), leaves, dout)

        return [forward, forward_backward]


class Recorder:
    """Times tables of rows, prints them and writes them to one file as it goes."""

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.path, self.facts = path, facts
        self.rows: list[dict[str, Any]] = []
        self.started = time.monotonic()

    def table(
        self,
        rows: Sequence[Row],
        *,
        alone: tuple[float, float] | None = None,
        rounds: int = ROUNDS,
    ) -> Any:
        """Time the rows in turn. Efficiency is one GPU's time over (W x the row's).

        Args:
            alone: one GPU's forward and forward + backward ms; by default the first row's, round
                by round.
            rounds: how often each row's turn comes.

        Returns:
            The first row's forward and forward + backward ms.
        """
        calls = [call for row in rows for call in row.calls()]
        peaks = [self._peak_bytes(call) for call in calls]
        samples = self._in_turn(calls, rounds)
        for i, row in enumerate(rows):
            forward, total = samples[2 * i : 2 * i + 2]
            figures = {"forward_ms": statistics.median(forward)}
            figures["total_ms"] = statistics.median(total)
            if not row.on_one_gpu:
                one = samples[:2] if alone is None else [[ms] * len(total) for ms in alone]
                figures |= self._efficiencies(one, forward, total)
            tensor = row.tensors[0]
            figures["peak_in_tensors"] = peaks[2 * i + 1] / (tensor.numel() * tensor.element_size())
            self.row(row.what, **figures, **row.facts)
        return statistics.median(samples[0]), statistics.median(samples[1])

    def _efficiencies(
        self, one: Sequence[Sequence[float]], forward: Sequence[float], total: Sequence[float]
    ) -> dict[str, float]:
        of_forward, of_total = (
            [alone / (self.size * ms) for alone, ms in zip(of_one, of_row, strict=True)]
            for of_one, of_row in zip(one, (forward, total), strict=True)
        )
        return {
            "forward_efficiency": statistics.median(of_forward),
            "efficiency": statistics.median(of_total),
            "efficiency_least": min(of_total),
            "efficiency_most": max(of_total),
        }

    def row(self, what: str, **figures: Any) -> None:
        """Record one row, print it, and write the file anew."""
        self.rows.append({"what": what, **figures})
        if self.rank == 0:
            shown = "  ".join(
                f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()
            )
            print(f"[{time.monotonic() - self.started:5.1f}s] {what:44s} {shown}", flush=True)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n")

    def attempt(self, measurement: Callable[..., Any], *args: Any) -> Any:
        """A measurement that fails is a row, not the end of the others."""
        try:
            return measurement(self, *args)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}".replace("\n", " ")
            self.row(f"FAILED {measurement.__name__} {args}"[:60], reason=reason[:300])
            return None

    def _in_turn(
        self, calls: Sequence[Callable[[], object]], rounds: int
    ) -> list[tuple[float, ...]]:
        """Each call's samples, one a round."""
        once = [self._round_ms(call, 1) for call in calls]
        counts = [max(LEAST_CALLS, min(20, int(SAMPLE_MS / ms))) for ms in once]
        samples: list[list[float]] = [[] for _ in calls]
        order, draws = list(range(len(calls))), random.Random(0)  # the same on every rank
        for _ in range(rounds):
            draws.shuffle(order)
            for i in order:
                samples[i].append(self._round_ms(calls[i], counts[i]))
        return [tuple(each) for each in samples]

    def _round_ms(self, call: Callable[[], object], count: int) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        torch.cuda.synchronize()
        start.record()
        for _ in range(count):
            call()
        stop.record()
        torch.cuda.synchronize()
        slowest = torch.tensor(start.elapsed_time(stop) / count, device=self.device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        return max(1e-3, float(slowest.item()))

    def _peak_bytes(self, call: Callable[[], object]) -> int:
        """Memory that a call takes at its peak, the most of any rank; also warms it up."""
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        peak = torch.tensor(torch.cuda.max_memory_allocated() - held, device=self.device)
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        return int(peak.item())
