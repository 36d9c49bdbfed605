"""Play lengths through the planner and its baselines on modelled clusters of any size.

Every batch is planned as in training and takes what the cost model says; with `noise`, every
group's time is multiplied by a random factor, and the step waits for its slowest group, as it
would in a run whose predictions are that far off.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from seqpar.errors import PlanError
from seqpar.planners.anytime import Planner
from seqpar.planners.cost import CostModel
from seqpar.planners.forecast import Estimate, Forecast, longest_document, summarise
from seqpar.planners.histogram import LengthHistogram
from seqpar.planners.plan import ScatterPlan
from seqpar.planners.problem import Cluster, ScatterProblem
from seqpar.planners.workers import Workers, map_with

__all__ = ["MAX_DEVICES", "Simulation", "SimulationRow", "batches_of", "simulate"]

MAX_DEVICES = 4096

Batches = Callable[[int, int], list[list[int]]]
"""(sequences a batch, longest that fits) -> the batches of a simulation."""


@dataclass(frozen=True)
class SimulationRow:
    """One cluster size: what the planner and each baseline make of the same batches."""

    devices: int
    forecast: Forecast
    gap: Estimate
    solve_ms: Estimate
    noisy_step_ms: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        noisy = self.noisy_step_ms
        return {
            "devices": self.devices,
            **self.forecast.to_json(),
            "gap": self.gap.mean,
            "solve_ms": self.solve_ms.mean,
            "noisy_step_ms": noisy.mean if noisy else None,
        }


@dataclass(frozen=True)
class Simulation:
    """Rows by cluster size, in the order asked for."""

    rows: tuple[SimulationRow, ...]
    noise: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object."""
        return {"noise": self.noise, "rows": [row.to_json() for row in self.rows]}


def batches_of(source: Sequence[int] | LengthHistogram, *, batches: int, seed: int = 0) -> Batches:
    """Batches from a length file, in its order and from the start again when it ends, or drawn
    from a histogram. What is longer than fits is dropped.

    Raises:
        PlanError: no batches asked for, or no lengths.
    """
    if batches < 1:
        raise PlanError(f"a simulation needs at least 1 batch, got {batches}")
    if isinstance(source, LengthHistogram):
        histogram = source
        return lambda count, longest: [
            histogram.sample(count, seed=seed * 1_000_003 + i, max_tokens=longest)
            for i in range(batches)
        ]
    lengths = list(source)
    if not lengths:
        raise PlanError("there are no lengths to simulate")

    def from_file(count: int, longest: int) -> list[list[int]]:
        fitting = [length for length in lengths if length <= longest]
        if not fitting:
            raise PlanError(f"no length is within the {longest} tokens that the cluster holds")
        taken = [fitting[i % len(fitting)] for i in range(batches * count)]
        return [taken[i : i + count] for i in range(0, len(taken), count)]

    return from_file


def simulate(
    batches: Batches,
    cluster: Cluster,
    cost: CostModel,
    *,
    devices: Sequence[int],
    sequences_per_device: float = 8.0,
    context_tokens: int | None = None,
    noise: float = 0.0,
    planner: Planner | None = None,
    seed: int = 0,
    workers: Workers | None = None,
) -> Simulation:
    """Plan the batches on each cluster size.

    Args:
        batches: where lengths come from (`batches_of`).
        cluster: memory, and devices a node; its own size does not matter.
        devices: cluster sizes, to 4,096.
        sequences_per_device: sets the batch: more devices train on more sequences a step.
        context_tokens: longest document of the run: longer ones are dropped, and the fixed-degree
            baseline has to hold it where the cluster can.
        workers: processes that share the batches of each size.
        noise: standard deviation of the logarithm of each group's time about its prediction.

    Raises:
        PlanError: sizes beyond 1..4,096, a negative noise or batch, or batches without sequences.
    """
    if not devices or min(devices) < 1 or max(devices) > MAX_DEVICES:
        raise PlanError(f"simulate takes 1 to {MAX_DEVICES} devices, got {list(devices)}")
    if not sequences_per_device > 0:
        raise PlanError(f"sequences_per_device must be over 0, got {sequences_per_device}")
    if not 0 <= noise < 2:
        raise PlanError(f"noise is a standard deviation from 0 to 2, got {noise}")
    planner = planner or Planner(time_limit_ms=100)
    rows = []
    for size in devices:
        problems = _problems(
            batches, cluster, cost, size, round(sequences_per_device * size), context_tokens
        )
        plans = map_with(workers, planner.plan, problems)
        rows.append(_row(problems, plans, list(_noisy(plans, noise, seed)) if noise else []))
    return Simulation(tuple(rows), noise)


def _problems(
    batches: Batches,
    cluster: Cluster,
    cost: CostModel,
    devices: int,
    sequences: int,
    context_tokens: int | None,
) -> list[ScatterProblem]:
    """The batches of one cluster size."""
    sized = Cluster(
        devices=devices,
        devices_per_node=min(cluster.devices_per_node, devices),
        memory_bytes=cluster.memory_bytes,
    )
    longest = longest_document(sized, cost)
    context = min(longest, context_tokens or longest)
    return [
        ScatterProblem(tuple(lengths), sized, cost, context if context_tokens else None)
        for lengths in batches(max(1, sequences), context)
    ]


def _row(
    problems: Sequence[ScatterProblem], plans: Sequence[ScatterPlan], noisy_ms: list[float]
) -> SimulationRow:
    longest = longest_document(problems[0].cluster, problems[0].cost)
    return SimulationRow(
        devices=problems[0].cluster.devices,
        forecast=summarise(list(zip(problems, plans, strict=True)), longest_tokens=longest),
        gap=Estimate.of([plan.gap for plan in plans]),
        solve_ms=Estimate.of([plan.solve_ms for plan in plans]),
        noisy_step_ms=Estimate.of(noisy_ms) if noisy_ms else None,
    )


def _noisy(plans: Sequence[ScatterPlan], noise: float, seed: int) -> Iterator[float]:
    """ms of each step when every group's time is off by a lognormal factor of mean 1."""
    rng = random.Random(seed)
    shift = -noise * noise / 2
    for plan in plans:
        yield math.fsum(
            max(group.predicted_ms * math.exp(rng.gauss(shift, noise)) for group in batch.groups)
            for batch in plan.micro_batches
        )
