"""Measure this machine on ranks of its own: what `seqpar calibrate` does.

Every rank is a process, on gloo and CPU or on NCCL and one CUDA device each. All ranks are at work
in every measurement, compute and collectives alike. A hybrid decoder of the sizes asked for stands
for the model to be planned; for a model of your own, call `seqpar.calibration.calibrate_model`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.calibration import Calibration, calibrate_model
from seqpar.mesh import GroupPool
from seqpar.models import Decoder, hybrid
from seqpar.ranks import run_on_ranks
from seqpar.training import PlanExecutor

__all__ = ["CalibrationJob", "Collective", "MachineCalibration", "calibrate_machine"]

STATE_BYTES_PER_PARAMETER = 12
"""Float32 weight and two Adam moments, on every device; the gradient is measured."""

REPEATS = 5

LIMIT_S = 35.0
"""For the model: collectives and the start of the ranks have the rest of the promised 60 s."""


@dataclass(frozen=True, kw_only=True)
class CalibrationJob:
    """What to measure.

    Attributes:
        ranks: processes; degrees are the powers of two up to it.
        device: "cpu" or "cuda".
        dim, layers, heads, softmax_every: the hybrid decoder's sizes.
        vocabulary: rows of its embedding.
        longest_tokens: the longest document at degree 1; None as in `calibrate_model`.
        precision: "float32", or "bfloat16" for torch.autocast over float32 parameters.
        message_bytes: sizes of the collectives.
        talk: rank 0 says on stderr what it measures, as it goes.
    """

    ranks: int = 2
    device: str = "cpu"
    dim: int = 256
    layers: int = 4
    heads: int = 4
    softmax_every: int = 4
    vocabulary: int = 256
    longest_tokens: int | None = None
    precision: str = "float32"
    message_bytes: tuple[int, ...] = (2**14, 2**18, 2**22)
    talk: bool = False

    @property
    def degrees(self) -> tuple[int, ...]:
        """Powers of two that divide the ranks."""
        return tuple(2**i for i in range(self.ranks.bit_length()) if self.ranks % 2**i == 0)


@dataclass(frozen=True)
class Collective:
    """One all-to-all: bytes that each rank sends, the degree, and the median ms."""

    degree: int
    message_bytes: int
    ms: float

    @property
    def gib_per_s(self) -> float:
        """2^30 bytes a second that each rank sends."""
        return self.message_bytes / self.ms * 1e3 / 2**30


@dataclass(frozen=True)
class MachineCalibration:
    """The model's fitted costs, and the machine's collectives by size and degree."""

    calibration: Calibration
    collectives: tuple[Collective, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `cost` is what a cost file holds."""
        rows = [asdict(row) | {"gib_per_s": row.gib_per_s} for row in self.collectives]
        return {
            "cost": self.calibration.cost.to_json(),
            "measurements": [row._asdict() for row in self.calibration.measurements],
            "first_ms": list(self.calibration.first_ms),
            "collectives": rows,
            "seconds": self.seconds,
        }


def calibrate_machine(job: CalibrationJob, *, timeout_s: float = 300.0) -> MachineCalibration:
    """Start the ranks, measure, fit, end the ranks.

    Raises:
        MeshError: more ranks than CUDA devices, or fewer than one.
        LaunchError: a rank died or did not end in time.
    """
    start = time.perf_counter()
    results = run_on_ranks(_measure, job, ranks=job.ranks, device=job.device, timeout_s=timeout_s)
    calibration, collectives = results[0]
    return MachineCalibration(calibration, collectives, time.perf_counter() - start)


def _measure(rank: int, job: CalibrationJob) -> tuple[Calibration, tuple[Collective, ...]]:
    say = _say if job.talk and rank == 0 else None
    if say:
        say("the ranks are connected")
    cuda = job.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    torch.manual_seed(0)
    model = Decoder(_decoder(job)).to(device)
    pool = GroupPool()
    executor = PlanExecutor(
        model,
        pool,
        world=dist.group.WORLD,
        device=device,
        autocast=torch.bfloat16 if job.precision == "bfloat16" else None,
    )
    calibration = calibrate_model(
        executor,
        degrees=job.degrees,
        vocab_size=job.vocabulary,
        longest_tokens=job.longest_tokens,
        limit_s=LIMIT_S,
        on_progress=say,
    )
    parameters = sum(parameter.numel() for parameter in model.parameters())
    fixed = calibration.cost.memory_fixed_bytes + STATE_BYTES_PER_PARAMETER * parameters
    cost = replace(calibration.cost, name=job.device, memory_fixed_bytes=fixed)
    collectives = tuple(_collectives(rank, job, pool, device))
    pool.close()
    return replace(calibration, cost=cost), collectives


def _say(what: str) -> None:
    print(f"{time.strftime('%T')} {what}", file=sys.stderr, flush=True)


def _decoder(job: CalibrationJob) -> Any:
    return hybrid(
        vocab_size=job.vocabulary,
        dim=job.dim,
        num_layers=job.layers,
        num_heads=job.heads,
        hidden=3 * job.dim // 2,
        softmax_every=job.softmax_every,
        softmax_heads=job.heads,
        softmax_kv_heads=job.heads,
        softmax_head_dim=job.dim // job.heads,
        softmax_strategy="ring",
    )


def _collectives(
    rank: int, job: CalibrationJob, pool: GroupPool, device: torch.device
) -> Iterator[Collective]:
    """All-to-alls of every size at every degree, all groups at work at once."""
    for degree in job.degrees[1:]:
        starts = range(0, job.ranks, degree)
        pool.prepare([tuple(range(start, start + degree)) for start in starts])
        group = pool.group(tuple(range(rank // degree * degree, (rank // degree + 1) * degree)))
        for size in job.message_bytes:
            yield Collective(degree, size, _all_to_all_ms(size, degree, group, device))


def _all_to_all_ms(
    size: int, degree: int, group: ProcessGroup | None, device: torch.device
) -> float:
    """Median over repeats of the slowest rank of the world."""
    each = torch.zeros(max(1, size // 4 // degree), device=device)
    sends, shapes = [each] * degree, [each.shape] * degree
    times = []
    for _ in range(REPEATS + 1):
        dist.barrier()
        start = _now(device)
        comm.all_to_all(sends, shapes, group)
        took = torch.tensor([_now(device) - start], dtype=torch.float64, device=device)
        times.append(comm.all_gather(took, dist.group.WORLD).max().item() * 1e3)
    return median(times[1:])


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
