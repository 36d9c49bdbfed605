"""Measures what a model costs on this machine, for the planner to plan with.

Every degree is measured with all ranks at work at once, as in training: on ranks that share cores
or links, a group alone would look faster than it will ever be. The constants are then fitted by
`seqpar.planners.calibrate`. It takes seconds, and is done at the start of a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from seqpar import comm
from seqpar.calibration_memory import MemoryUse, memory_use
from seqpar.planners import CostModel, Group, MicroBatch, ScatterPlan
from seqpar.planners.calibrate import GroupMeasurement, fit
from seqpar.training import PlanExecutor

__all__ = ["Calibration", "calibrate_model", "every_rank_busy", "measured_shapes"]

CPU_TOKENS = 4096
MOST_TOKENS = 2**18
SHORT_TOKENS = 509
"""Odd, as documents are: kernels are compiled apart for lengths that 16 divides."""

MEMORY_TOKENS = 8192
TELLING_TIMES = 4
"""The longest document takes at least so many times what a group of 64 tokens takes."""

MOST_TRIES, ENOUGH_MS = 3, 600.0
"""A shape is timed up to so often, until its runs have taken that long; the least time counts."""


FEWEST_SHAPES_FIRST, FEWEST_SHAPES = 3, 2
"""As many as there are constants: quadratic, linear and fixed; then a degree's wire and latency."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The fitted cost model, what it was fitted to, and how long measuring took.

    `first_ms` is what each measured shape took the first time, which may compile kernels, plan and
    allocate; it is not in the fit.
    """

    cost: CostModel
    measurements: tuple[GroupMeasurement, ...]
    first_ms: tuple[float, ...]
    seconds: float

    def summary(self) -> str:
        """One line for people."""
        per_token = self.cost.memory_bytes_per_token / 1024
        return (
            f"calibrated in {self.seconds:.1f} s from {len(self.measurements)} measurements: "
            f"{self.cost.group_ms([4096], 1):,.0f} ms for 4,096 tokens alone, "
            f"{per_token:.0f} KiB a token, worst residual {self.cost.errors['worst_relative']:.0%}"
        )


def calibrate_model(
    executor: PlanExecutor,
    *,
    degrees: Sequence[int],
    vocab_size: int,
    strategy: str = "ring",
    longest_tokens: int | None = None,
    limit_s: float = 20.0,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> Calibration:
    """Time forward and backward by degree and length on all ranks, and fit the constants.

    Args:
        executor: the model and the ranks it will train on. Collective; gradients end up zeroed.
        degrees: sizes of groups to measure; each must divide the number of ranks.
        vocab_size: token ids are drawn below it.
        strategy: what the model's softmax layers run at degrees over 1.
        longest_tokens: the document whose time tells the quadratic part, at degree 1; at degree
            d it is sqrt(d) times as long, which costs a rank about the same. By default 4,096 on
            CPU; on CUDA, where launches hide short documents, as long as it takes for the work
            to show, within half of the free memory.
        limit_s: once measuring has taken so long, a degree is measured on as few shapes as tell
            its constants: 3 at the first degree, 2 at the others, instead of 4. First runs that
            compile kernels are what takes long.
        on_progress: told what was measured, as it goes.
    """
    start = time.perf_counter()
    say = on_progress or (lambda _: None)
    rows: list[GroupMeasurement] = []
    first_ms: list[float] = []
    probe = _Probe(executor, vocab_size, torch.Generator().manual_seed(seed))
    probe.once(1, (64,))  # makes gradients and workspaces
    say("64 tokens run")
    memory = memory_use(executor, vocab_size=vocab_size, tokens=MEMORY_TOKENS)
    say(f"{memory.bytes_per_token / 2**10:,.0f} KiB a token")
    if longest_tokens is None:
        longest_tokens = _telling_tokens(probe, memory)
    say(f"longest document: {longest_tokens:,} tokens at degree 1")
    for degree in degrees:
        probe.once(degree, (64 * degree,))  # cut over its ranks: connects them, warms up
        say(f"degree {degree} runs")
        fewest = FEWEST_SHAPES if rows else FEWEST_SHAPES_FIRST
        for count, lengths in enumerate(measured_shapes(degree, longest_tokens)):
            late = time.perf_counter() - start > limit_s
            if count >= fewest and comm.broadcast_object(late, executor.world):
                break
            first, ms = probe.first_and_steady_ms(degree, lengths)
            first_ms.append(first)
            rows.append(GroupMeasurement(degree=degree, lengths=lengths, ms=ms))
            tokens = f"{sum(lengths):,} tokens of {len(lengths)} documents"
            say(f"degree {degree}, {tokens}: {ms:,.1f} ms, the first time {first:,.0f}")
    executor.model.zero_grad(set_to_none=True)
    cost = fit(
        rows,
        strategy=strategy,
        memory_bytes_per_token=memory.bytes_per_token,
        memory_fixed_bytes=memory.fixed_bytes,
    )
    return Calibration(
        cost=cost,
        measurements=tuple(rows),
        first_ms=tuple(first_ms),
        seconds=time.perf_counter() - start,
    )


def measured_shapes(degree: int, longest_tokens: int) -> Iterator[tuple[int, ...]]:
    """Documents of one group, the most telling first.

    Few tokens, one long document, many short documents, a mixture.
    """
    short = max(1, min(SHORT_TOKENS, longest_tokens // 8))
    half = max(1, longest_tokens // 2 // short) * degree
    long = math.isqrt(longest_tokens**2 * degree)
    yield (short,) * max(degree, half // 4)
    yield (long,)
    yield (short,) * half
    yield (long // 2, *(short,) * (half // 2))


def _telling_tokens(probe: _Probe, memory: MemoryUse) -> int:
    """How long a document must be for its own work to stand out of what every group costs."""
    if probe.executor.device.type != "cuda":
        return CPU_TOKENS
    executor = probe.executor
    free = torch.tensor(torch.cuda.mem_get_info(executor.device)[0], device=executor.device)
    least_free = comm.all_gather(free, executor.world).min().item()
    most = min(MOST_TOKENS, int(least_free / 2 / memory.bytes_per_token))
    (_, least_ms), tokens = probe.first_and_steady_ms(1, (64,)), CPU_TOKENS
    while 2 * tokens <= most:
        _, ms = probe.first_and_steady_ms(1, (tokens,))
        if ms >= TELLING_TIMES * least_ms:
            break
        tokens *= 2
    return tokens


@dataclass(frozen=True)
class _Probe:
    """Runs documents on all ranks at once and times them."""

    executor: PlanExecutor
    vocab_size: int
    generator: torch.Generator

    def first_and_steady_ms(self, degree: int, lengths: Sequence[int]) -> tuple[float, float]:
        """The first time, and the least of a few; on CUDA, where the first compiles, apart from it.

        Ranks agree on how often they try: `once` tells all of them the same time.
        """
        first = self.once(degree, lengths)
        times = [self.once(degree, lengths) if self.executor.device.type == "cuda" else first]
        while len(times) < MOST_TRIES and sum(times) < ENOUGH_MS:
            times.append(self.once(degree, lengths))
        return first, min(times)

    def once(self, degree: int, lengths: Sequence[int]) -> float:
        """The mean time of the groups: all run documents of these lengths at the same time."""
        documents = [
            torch.randint(self.vocab_size, (tokens,), generator=self.generator)
            for _ in range(self.executor.num_ranks // degree)
            for tokens in lengths
        ]
        plan = every_rank_busy(self.executor.num_ranks, degree, len(lengths))
        times = self.executor.forward_backward(plan, documents).group_ms[0]
        return sum(times) / len(times)


def every_rank_busy(num_ranks: int, degree: int, documents_a_group: int) -> ScatterPlan:
    """One micro-batch of groups of a degree on all ranks, each with as many documents."""
    groups = tuple(
        Group(
            ranks=tuple(range(index * degree, (index + 1) * degree)),
            degree=degree,
            strategy="local",
            sequences=tuple(range(index * documents_a_group, (index + 1) * documents_a_group)),
            predicted_ms=0.0,
            tokens=0,
        )
        for index in range(num_ranks // degree)
    )
    return ScatterPlan(micro_batches=(MicroBatch(makespan_ms=0.0, groups=groups),))
