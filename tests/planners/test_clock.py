"""The time limit holds, on a slow machine too; where it does not bind, plans repeat."""

from __future__ import annotations

import os
import time
from itertools import count

import numpy as np
import pytest

from seqpar.planners import Cluster, Planner, ScatterPlan, ScatterProblem, preset
from seqpar.planners.clock import Clock
from tests.planners.test_plan import flexsp_problem


def many_micro_batches(sequences: int, *, devices: int = 8) -> ScatterProblem:
    rng = np.random.default_rng(0)
    cluster = Cluster(devices=devices, devices_per_node=8, memory_bytes=28 * 2**30)
    lengths = rng.lognormal(np.log(1400), 1.45, sequences).clip(1, 25_000).astype(int)
    return ScatterProblem(tuple(lengths.tolist()), cluster, preset("flexsp-7b"))


def slow_clock(monkeypatch: pytest.MonkeyPatch, *, ms_per_look: float) -> None:
    """Every look at the clock finds that much time gone."""
    looks = count()
    monkeypatch.setattr(time, "monotonic", lambda: next(looks) * ms_per_look / 1e3)


def test_a_clock_strikes_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_clock(monkeypatch, ms_per_look=10)
    clock = Clock(25)
    assert [clock.is_over() for _ in range(4)] == [False, False, True, True]
    assert clock.has_struck
    assert not Clock().is_over()
    assert Clock(35).earlier(30).is_over()


def test_the_clock_cuts_the_search_and_the_plan_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = flexsp_problem(2)
    whole = Planner(time_limit_ms=60, repeatable=True).plan(problem)
    assert not whole.cut_short
    slow_clock(monkeypatch, ms_per_look=20)
    cut = Planner(time_limit_ms=60).plan(problem)
    cut.verify(problem)
    assert cut.cut_short
    assert ScatterPlan.from_json(cut.to_json()).cut_short
    assert cut.makespan_ms >= whole.makespan_ms
    assert cut.makespan_ms <= min(cut.baselines.values())
    assert Planner(time_limit_ms=60, repeatable=True).plan(problem) == whole


def test_what_the_clock_does_not_cut_repeats() -> None:
    problem = flexsp_problem(3)
    sure = Planner(time_limit_ms=100, repeatable=True).plan(problem)
    whole = 0
    for _ in range(40):  # counted work takes half the limit, unless the machine is busy
        plan = Planner(time_limit_ms=100).plan(problem)
        assert plan.cut_short or plan == sure
        whole += not plan.cut_short
        if whole == 3:
            return
    busy = os.getloadavg()[0] > 2 * (os.cpu_count() or 1)
    assert busy, f"{whole} of 40 plans of 100 ms were whole on a machine that is not busy"


@pytest.mark.parametrize(
    ("problem", "limit_ms"),
    [
        (many_micro_batches(2048), 400.0),
        (many_micro_batches(4096, devices=256), 800.0),
    ],
)
def test_the_limit_holds(problem: ScatterProblem, limit_ms: float) -> None:
    planner = Planner(time_limit_ms=limit_ms, bound="none")
    took = min(planner.plan(problem).solve_ms for _ in range(3))
    assert took < 1.1 * limit_ms


def test_many_micro_batches_are_planned_near_their_bound() -> None:
    plan = Planner(time_limit_ms=200).plan(many_micro_batches(1024))
    assert len(plan.micro_batches) > 100
    assert plan.step_gap < 0.02
