"""The mixed-integer programme finds known optima and never worsens a plan."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pulp
import pytest

from seqpar.errors import PlanError
from seqpar.planners import Planner
from seqpar.planners.batch import SortedBatch
from seqpar.planners.buckets import optimal_buckets
from seqpar.planners.cascade import pack_micro_batch
from seqpar.planners.milp import polish, solve_exact
from seqpar.planners.packing import makespan
from tests.planners.brute_force import best_micro_batch
from tests.planners.test_bounds import tiny
from tests.planners.test_plan import flexsp_problem


@pytest.mark.parametrize("solver", ["HiGHS", "CBC"])
def test_the_programme_finds_the_optimum(solver: str) -> None:
    problem = tiny(3, memory=60_000.0)
    batch = SortedBatch.of(problem)
    found = solve_exact(batch, range(5), solver=solver, buckets=5)
    assert found.exact_lengths
    assert found.makespan_ms == pytest.approx(best_micro_batch(problem, tuple(range(5))), rel=1e-5)
    assert found.gap == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("solver", ["HiGHS", "CBC"])
def test_a_limit_ends_the_solver_and_leaves_its_true_gap(solver: str) -> None:
    problem = flexsp_problem(3, count=60)
    batch = SortedBatch.of(problem)
    members = range(20, 34)
    found = solve_exact(batch, members, solver=solver, time_limit_s=1.0)
    assert found.solve_ms < 5000
    assert found.bound_ms is not None
    assert found.bound_ms <= makespan(batch, pack_micro_batch(batch, list(members)) or [])
    if found.packing is not None:
        assert found.gap is not None
        assert found.gap > 0.01, "far from proven, whatever PuLP calls it"
        assert found.bound_ms < found.objective_ms


def test_any_solver_that_pulp_finds_serves_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """COIN_CMD is CBC as found on the PATH; PuLP brings one along."""
    bundled = Path(pulp.PULP_CBC_CMD.pulp_cbc_path)
    monkeypatch.setenv("PATH", str(bundled.parent), prepend=os.pathsep)
    problem = tiny(3, memory=60_000.0)
    found = solve_exact(SortedBatch.of(problem), range(5), solver="COIN_CMD", buckets=5)
    assert found.makespan_ms == pytest.approx(best_micro_batch(problem, tuple(range(5))), rel=1e-5)


def test_buckets_round_up_least() -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 1000, 9).tolist()
    found = optimal_buckets(lengths, 3)
    assert sorted(i for _, inside in found for i in inside) == list(range(9))
    added = sum(longest - lengths[i] for longest, inside in found for i in inside)
    rising = sorted(lengths)
    least = min(
        sum(rising[b - 1] - s for a, b in itertools.pairwise((0, *cuts, 9)) for s in rising[a:b])
        for cuts in itertools.combinations(range(1, 9), 2)
    )
    assert added == least


def test_polishing_keeps_a_plan_valid_and_no_worse() -> None:
    problem = tiny(1)
    plan = Planner(time_limit_ms=5).plan(problem)
    polished, found = polish(problem, plan, time_limit_s=2)
    polished.verify(problem)
    assert polished.makespan_ms <= plan.makespan_ms
    assert [result.sequences for result in found] == [
        sum(len(group.sequences) for group in batch.groups) for batch in plan.micro_batches
    ]


def test_an_unknown_solver_is_named() -> None:
    batch = SortedBatch.of(tiny(0))
    with pytest.raises(PlanError, match=r"'nope'.*PULP_CBC_CMD"):
        solve_exact(batch, range(5), solver="nope")
