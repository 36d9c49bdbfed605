"""What is said of measured steps of a plan, and over all of them. Not a benchmark itself."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from seqpar.planners import CostModel, ScatterPlan
from seqpar.training import StepResult

__all__ = ["compared", "described", "summary"]


def compared(
    plan: ScatterPlan,
    documents: list[torch.Tensor],
    result: StepResult,
    calibrated: CostModel,
    device: torch.device,
) -> dict[str, Any]:
    """What was predicted and what was measured, of the step and of its groups."""
    lengths = [len(document) for document in documents]
    by_calibration, errors = 0.0, []
    for micro_batch, times in zip(plan.micro_batches, result.group_ms, strict=True):
        expected = [
            calibrated.group_ms([lengths[i] for i in g.sequences], g.degree)
            for g in micro_batch.groups
        ]
        by_calibration += max(expected)
        errors += [e / ms - 1 for e, ms in zip(expected, times, strict=True)]
    cuda = device.type == "cuda"
    total = torch.cuda.get_device_properties(device).total_memory if cuda else 1
    peak = torch.cuda.max_memory_allocated() if cuda else 0
    return {
        "measured_ms": result.step_ms,
        "groups_end_ms": max(s[1] for spans in result.group_spans_ms for s in spans),
        "predicted_ms": plan.makespan_ms,
        "calibrated_ms": by_calibration,
        "group_errors": errors,
        "degrees": [[g.degree for g in m.groups] for m in plan.micro_batches],
        "group_ms": result.group_ms,
        "loss": result.loss,
        "peak_memory_share": peak / total,
        "allocation_retries": _allocation_retries() if cuda else 0,
    }


def described(row: dict[str, Any], names: list[str]) -> str:
    """One line for people."""
    parts = [
        f"{name}: {row[name]['measured_ms']:.0f} ms (predicted "
        f"{row[name]['predicted_ms'] / row[name]['measured_ms'] - 1:+.1%}, "
        f"{row[name]['degrees']}, first {row[name]['first_ms']:.0f} ms, memory "
        f"{row[name]['peak_memory_share']:.0%}, retries {row[name]['allocation_retries']})"
        for name in names
    ]
    return (
        f"step {row['step']}: {row['tokens']:,} tokens, longest {row['longest']:,}; "
        + "; ".join(parts)
        + f"; waited {row['wait_ms']:.1f} of {row['plan_ms']:.0f} ms for the plan"
    )


def _allocation_retries() -> int:
    """How often the allocator has had to give back what it kept, which takes seconds."""
    retries: int = torch.cuda.memory_stats()["num_alloc_retries"]
    return retries


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all steps but the first; empty if there was no other."""
    counted = rows[1:]
    if not counted:
        return {}
    planned = [row["planned"] for row in counted]
    found: dict[str, Any] = {
        "steps": len(counted),
        "mean_prediction_error": _mean_error(planned, "predicted_ms"),
        "mean_calibration_error": _mean_error(planned, "calibrated_ms"),
        "worst_prediction_error": max(
            abs(p["predicted_ms"] / p["measured_ms"] - 1) for p in planned
        ),
        "planned_ms": [p["measured_ms"] for p in planned],
        "waited_ms": max(row["wait_ms"] for row in counted),
    }
    fixed = [name for name in ("degree 1", "degree 2") if all(name in row for row in counted)]
    for name in fixed:
        times = [row[name]["measured_ms"] for row in counted]
        found[f"{name}, ms"] = times
        found[f"over {name}"] = sum(times) / sum(found["planned_ms"])
    return found


def _mean_error(planned: list[dict[str, Any]], name: str) -> float:
    return statistics.fmean(abs(p[name] / p["measured_ms"] - 1) for p in planned)
