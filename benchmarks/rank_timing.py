"""Times on every rank at once: the slowest rank counts, and what is compared takes turns.

A row is one thing to time: a forward call and a forward + backward call of the same attention. Rows
of one table are timed in turn, round after round, so that a clock that changes changes all of them,
and in another order each round, because the clock of a device at its power limit depends on what
ran before.

A sample is a first call on an idle device and calls that follow it without a pause, as layers do,
for SAMPLE_MS together and LEAST_CALLS at least. A time is the mean of those that follow; the first
one also holds what the host takes to begin. Every rank's times are kept. One GPU's time is taken on
every GPU at once, the slowest counting as elsewhere: devices at their power limit differ by some
hundredths, and a time on many is that of the slowest.

| recorded                 | one GPU's time               | the row's time                    |
|--------------------------|------------------------------|-----------------------------------|
| efficiency (median over  | slowest GPU, following calls | slowest rank, following calls     |
| rounds), _least, _most   |                              |                                   |
| efficiency_from_idle     | slowest GPU, with the first  | slowest rank, with the first call |
| share_of_joint_speed     | of all GPUs together, each   | slowest rank, following calls     |
|                          | as fast as it is alone       |                                   |
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

SAMPLE_MS = 90.0
LEAST_CALLS = 2
ROUNDS = 5


@dataclass(frozen=True)
class Sample:
    """One turn of a call: the first one's ms and the mean ms of those that follow, by rank."""

    first: Sequence[float]
    following: Sequence[float]
    num_following: int

    @classmethod
    def median(cls, samples: Sequence[Sample]) -> Sample:
        """Rank by rank."""
        first, following = (
            [statistics.median(each) for each in zip(*times, strict=True)]
            for times in zip(*((s.first, s.following) for s in samples), strict=True)
        )
        return cls(first, following, samples[0].num_following)

    @property
    def ms(self) -> float:
        """Of a call that follows another."""
        return max(self.following)

    @property
    def from_idle_ms(self) -> float:
        """Of all calls, the first included."""
        return max(
            (first + self.num_following * ms) / (1 + self.num_following)
            for first, ms in zip(self.first, self.following, strict=True)
        )

    @property
    def joint_ms(self) -> float:
        """What all ranks would take for one such call, shared out by their speeds."""
        return 1 / sum(1 / ms for ms in self.following)


Samples = Sequence[Sample]


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
        alone: tuple[Sample, Sample] | None = None,
        rounds: int = ROUNDS,
    ) -> tuple[Sample, Sample]:
        """Time the rows in turn. Efficiency is one GPU's time over (W x the row's).

        Args:
            alone: one GPU's forward and forward + backward; by default the first row's, round by
                round.
            rounds: how often each row's turn comes.

        Returns:
            The medians of the first row's forward and forward + backward.
        """
        calls = [call for row in rows for call in row.calls()]
        peaks = [self._peak_bytes(call) for call in calls]
        samples = self._in_turn(calls, rounds)
        for i, row in enumerate(rows):
            forward, total = samples[2 * i : 2 * i + 2]
            figures: dict[str, Any] = {"forward_ms": statistics.median(s.ms for s in forward)}
            figures["total_ms"] = statistics.median(s.ms for s in total)
            figures["total_ms_by_rank"] = list(Sample.median(total).following)
            if not row.on_one_gpu:
                one = samples[:2] if alone is None else [[each] * rounds for each in alone]
                figures["forward_efficiency"] = self.efficiencies(one[0], forward)["efficiency"]
                figures |= self.efficiencies(one[1], total)
            tensor = row.tensors[0]
            figures["peak_in_tensors"] = peaks[2 * i + 1] / (tensor.numel() * tensor.element_size())
            self.row(row.what, **figures, **row.facts)
        return Sample.median(samples[0]), Sample.median(samples[1])

    def efficiencies(self, one: Samples, row: Samples) -> dict[str, float]:
        """The table above, of one GPU's samples and a row's."""
        pairs = list(zip(one, row, strict=True))
        following = [alone.ms / (self.size * here.ms) for alone, here in pairs]
        from_idle = [alone.from_idle_ms / (self.size * here.from_idle_ms) for alone, here in pairs]
        return {
            "efficiency": statistics.median(following),
            "efficiency_least": min(following),
            "efficiency_most": max(following),
            "efficiency_from_idle": statistics.median(from_idle),
            "share_of_joint_speed": statistics.median(a.joint_ms / here.ms for a, here in pairs),
        }

    def row(self, what: str, **figures: Any) -> None:
        """Record one row, print it, and write the file anew."""
        self.rows.append({"what": what, **figures})
        if self.rank == 0:
            shown = "  ".join(f"{name}={_shown(value)}" for name, value in figures.items())
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

    def _in_turn(self, calls: Sequence[Callable[[], object]], rounds: int) -> list[Samples]:
        """Each call's samples, one a round."""
        once = [self.sample(call, 1).ms for call in calls]
        counts = [max(LEAST_CALLS, min(20, int(SAMPLE_MS / ms))) for ms in once]
        samples: list[list[Sample]] = [[] for _ in calls]
        order, draws = list(range(len(calls))), random.Random(0)  # the same on every rank
        for _ in range(rounds):
            draws.shuffle(order)
            for i in order:
                samples[i].append(self.sample(calls[i], counts[i]))
        return list(samples)

    def sample(self, call: Callable[[], object], num_following: int) -> Sample:
        """One turn of a call, on all ranks at once."""
        begun, first, last = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        dist.barrier()
        torch.cuda.synchronize()
        begun.record()
        call()
        first.record()
        for _ in range(num_following):
            call()
        last.record()
        torch.cuda.synchronize()
        own = [begun.elapsed_time(first), first.elapsed_time(last) / num_following]
        by_rank = [torch.empty(2, device=self.device) for _ in range(self.size)]
        dist.all_gather(by_rank, torch.tensor(own, device=self.device))
        times = torch.stack(by_rank).clamp_min(1e-3).T.tolist()
        return Sample(*times, num_following)

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


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(map(_shown, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)
