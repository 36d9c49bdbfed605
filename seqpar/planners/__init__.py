"""Scatter plans: which devices each sequence of a batch is spread over. Imports no torch.

problem = ScatterProblem(lengths, Cluster(devices=64, memory_bytes=28 * 2**30), cost)
plan = Planner(time_limit_ms=200).plan(problem)
plan.makespan_ms, plan.gap, plan.baselines, plan.micro_batches
"""

from __future__ import annotations

from seqpar.planners.anytime import Planner
from seqpar.planners.baselines import best_degree_per_batch, best_fixed_degree
from seqpar.planners.cost import CostModel, Exchange, LayerCost, Link
from seqpar.planners.plan import Group, MicroBatch, ScatterPlan
from seqpar.planners.presets import preset
from seqpar.planners.problem import Cluster, ScatterProblem

__all__ = [
    "Cluster",
    "CostModel",
    "Exchange",
    "Group",
    "LayerCost",
    "Link",
    "MicroBatch",
    "Planner",
    "ScatterPlan",
    "ScatterProblem",
    "best_degree_per_batch",
    "best_fixed_degree",
    "preset",
]
