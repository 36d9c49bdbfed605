"""What a training run leaves behind: report.json for programs, report.html for people."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from seqpar.data import PlannedStep
from seqpar.training import StepResult

__all__ = ["DegreeComparison", "RunReport", "StepReport", "hardware", "versions"]


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One training step. `group_spans_ms[m][g]` is (start, stop) of a group, as measured."""

    step: int
    loss: float
    tokens: int
    documents: int
    plan: dict[str, Any]
    predicted_ms: float
    measured_ms: float
    group_spans_ms: Sequence[Sequence[Sequence[float]]]
    plan_ms: float
    plan_wait_ms: float

    @classmethod
    def of(cls, planned: PlannedStep, result: StepResult) -> StepReport:
        return cls(
            step=planned.step,
            loss=result.loss,
            tokens=result.num_tokens,
            documents=len(planned.documents),
            plan=planned.plan.to_json(),
            predicted_ms=planned.plan.makespan_ms,
            measured_ms=result.step_ms,
            group_spans_ms=result.group_spans_ms,
            plan_ms=planned.plan_ms,
            plan_wait_ms=planned.wait_ms,
        )


@dataclass(frozen=True, kw_only=True)
class DegreeComparison:
    """The same batches, forward and backward, by the planner's plans and by one fixed degree.

    `speedup` is the fixed degree's total time over the planner's. With one rank there is only one
    degree and nothing to compare: the speed-up is then 1 by definition and `batches` is 0.
    """

    fixed_degree: int
    batches: int
    planned_ms: Sequence[float]
    fixed_ms: Sequence[float]

    @property
    def speedup(self) -> float:
        return sum(self.fixed_ms) / sum(self.planned_ms) if self.batches else 1.0


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """A whole run; losses in nats a token, times as their names say.

    `steps` are the fields of a `StepReport` each, as a checkpoint keeps them. `weights_sha256` is
    `seqpar.determinism.weights_digest` of the trained model.
    """

    name: str
    heldout_loss_first: float
    heldout_loss_last: float
    heldout: Sequence[tuple[int, float]]
    parity_relative_error: float
    wall_s: float
    comparison: DegreeComparison
    ranks: int
    device: str
    document_lengths: Sequence[int]
    cost: dict[str, Any]
    prediction_error: float
    settings: dict[str, Any]
    steps: Sequence[dict[str, Any]]
    weights_sha256: str

    @property
    def speedup_over_fixed_degree(self) -> float:
        return self.comparison.speedup

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {
            **fields,
            "speedup_over_fixed_degree": self.speedup_over_fixed_degree,
            "versions": versions(),
            "hardware": hardware(),
        }

    def write(self, folder: Path) -> None:
        """Write report.json and report.html into the folder."""
        from seqpar.report_html import render

        content = self.to_dict()
        (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
        (folder / "report.html").write_text(render(content))


def versions() -> dict[str, str]:
    """Versions of seqpar, of Python and of what the run stands on, as installed."""
    found = {"python": platform.python_version()}
    for package in ("seqpar", "torch", "triton", "numpy", "pulp", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """What the run ran on: processor, cores it may use, and the CUDA devices if there are any."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"processor": platform.machine(), "cores": cores, "cuda_devices": devices}
