"""Bounds and plans enclose the true optimum of tiny problems, found by trying everything."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from seqpar.planners import Cluster, Exchange, Planner, ScatterProblem
from seqpar.planners.batch import SortedBatch
from seqpar.planners.bounds import degree_bound, step_bound
from seqpar.planners.certificate import bound_plan
from seqpar.planners.configuration import configuration_bound
from seqpar.planners.knapsack import most_valuable
from seqpar.planners.plan import Group, MicroBatch
from tests.planners.brute_force import best_micro_batch, best_step
from tests.planners.test_plan import FLEXSP, SMALL, flexsp_problem


def tiny(seed: int, *, memory: float = 16384.0) -> ScatterProblem:
    rng = np.random.default_rng(seed)
    lengths = np.exp(rng.uniform(np.log(50), np.log(3.9 * memory), 5)).astype(int)
    return ScatterProblem(tuple(lengths.tolist()), Cluster(devices=4, memory_bytes=memory), SMALL)


@pytest.mark.parametrize("seed", range(8))
def test_plan_and_bounds_enclose_the_optimum_of_the_step(seed: int) -> None:
    problem = tiny(seed)
    optimum = best_step(problem)
    plan = Planner().plan(problem)
    assert step_bound(problem) <= optimum * (1 + 1e-9)
    assert optimum <= plan.makespan_ms * (1 + 1e-9)
    assert plan.makespan_ms <= 1.05 * optimum


@pytest.mark.parametrize("seed", range(3))
def test_bounds_of_one_micro_batch(seed: int) -> None:
    problem = tiny(seed, memory=60_000.0)
    members = tuple(range(5))
    optimum = best_micro_batch(problem, members)
    degree = degree_bound(problem, members)
    whole = Group((0, 1, 2, 3), 4, "ulysses", members, 2 * optimum, sum(problem.lengths))
    configuration = configuration_bound(problem, MicroBatch(2 * optimum, (whole,)), precision=1e-4)
    assert degree <= configuration * (1 + 1e-12)
    assert configuration <= optimum * (1 + 1e-9)
    assert configuration >= 0.85 * optimum


def test_bounds_hold_where_strategies_compete() -> None:
    """A group takes its cheapest strategy, so a bound must not assume a dearer one."""
    ring = Exchange(strategy="ring", peer_bytes_per_token=3e5)
    links = tuple(replace(link, latency_ms=20.0 * link.degree) for link in SMALL.links)
    model = replace(SMALL, exchanges=(*SMALL.exchanges, ring), links=links)
    for seed in range(3):
        problem = replace(tiny(seed), cost=model)
        optimum, plan = best_step(problem), Planner().plan(problem)
        plan.verify(problem)
        assert plan.step_lower_bound_ms <= optimum * (1 + 1e-9)
        assert optimum <= plan.makespan_ms * (1 + 1e-9) <= 1.1 * optimum


def test_configuration_bound_certifies_a_flexsp_plan() -> None:
    problem = flexsp_problem(1, count=160)
    plan = Planner(time_limit_ms=50).plan(problem)
    certified = bound_plan(problem, plan, kind="configuration")
    assert certified.bound == "configuration"
    assert certified.lower_bound_ms >= plan.lower_bound_ms
    assert 0 <= certified.gap < 0.03
    assert all(batch.gap < 0.05 for batch in certified.micro_batches)


def test_a_knapsack_finds_the_best_set_under_both_limits() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        values, time, tokens = rng.uniform(0.05, 1, (3, 8))
        found = most_valuable(values, time, tokens, max_nodes=10_000)
        best = max(
            values[list(chosen)].sum()
            for mask in range(256)
            if (chosen := [i for i in range(8) if mask >> i & 1]) is not None
            and time[list(chosen)].sum() <= 1
            and tokens[list(chosen)].sum() <= 1
        )
        assert found.value == pytest.approx(best)
        assert found.upper >= best - 1e-12
        cut_short = most_valuable(values, time, tokens, max_nodes=1)
        assert cut_short.upper >= best - 1e-12


def test_sequences_are_sorted_longest_first() -> None:
    batch = SortedBatch.of(ScatterProblem((5, 9, 9, 1), FLEXSP, flexsp_problem(0).cost))
    assert batch.tokens == (9, 9, 5, 1)
    assert batch.order == (1, 2, 0, 3)
