"""The API of a plan: valid, verified, JSON both ways, never worse than its baselines, no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from seqpar.errors import InfeasiblePlanError, PlanError
from seqpar.planners import (
    Cluster,
    CostModel,
    Exchange,
    LayerCost,
    Link,
    Planner,
    ScatterPlan,
    ScatterProblem,
    best_fixed_degree,
    preset,
)

FLEXSP = Cluster(devices=64, devices_per_node=8, memory_bytes=28 * 2**30)
SMALL = CostModel(
    name="small",
    layers=(LayerCost(kind="softmax", quadratic_ms=1e-6, linear_ms=0.1),),
    fixed_ms=5.0,
    exchanges=(Exchange(strategy="ulysses", bytes_per_token=1e6),),
    links=(Link(degree=2, gib_per_s=10.0), Link(degree=4, gib_per_s=8.0)),
    memory_bytes_per_token=1.0,
)


def lognormal(seed: int, *, count: int = 512, mean: float = 1400, sigma: float = 1.45) -> list[int]:
    rng = np.random.default_rng(seed)
    lengths = rng.lognormal(np.log(mean), sigma, 4 * count).astype(int)
    return lengths[(lengths >= 1) & (lengths <= 196_608)][:count].tolist()


def flexsp_problem(seed: int, *, count: int = 512) -> ScatterProblem:
    return ScatterProblem(tuple(lognormal(seed, count=count)), FLEXSP, preset("flexsp-7b"))


@pytest.mark.parametrize("seed", range(4))
def test_plans_are_valid_and_never_worse_than_baselines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, [200, 5000, 32768][seed % 3], int(rng.integers(1, 60)))
    problem = ScatterProblem(tuple(lengths), Cluster(devices=4, memory_bytes=16384.0), SMALL)
    planner = Planner(time_limit_ms=20, repeatable=True)
    plan = planner.plan(problem)
    plan.verify(problem)
    assert plan.makespan_ms <= min(plan.baselines.values()) * (1 + 1e-12)
    assert (
        plan.step_lower_bound_ms
        <= plan.lower_bound_ms * (1 + 1e-9)
        <= plan.makespan_ms * (1 + 1e-9)
    )
    assert ScatterPlan.from_json(plan.to_json()) == plan
    assert ScatterProblem.from_json(problem.to_json()) == problem
    assert planner.plan(problem) == plan


def test_a_flexsp_step_is_near_its_bound() -> None:
    problem = flexsp_problem(0)
    plan = Planner().plan(problem)
    assert plan.lower_bound_ms <= plan.makespan_ms < 1.2 * plan.step_lower_bound_ms
    assert plan.baselines["best_degree_per_batch"] > 1.3 * plan.makespan_ms


def test_one_sequence_runs_at_its_best_degree() -> None:
    problem = ScatterProblem((4096,), Cluster(devices=4, memory_bytes=16384.0), SMALL)
    plan = Planner().plan(problem)
    best = min(SMALL.group_ms([4096], d) for d in (1, 2, 4))
    assert plan.makespan_ms == pytest.approx(best)
    assert plan.lower_bound_ms == pytest.approx(best)


def test_verify_rejects_each_broken_constraint() -> None:
    problem = ScatterProblem((9000, 800, 70), Cluster(devices=4, memory_bytes=4096.0), SMALL)
    plan = Planner().plan(problem)
    batch = plan.micro_batches[0]
    group = batch.groups[0]
    broken = {
        "times": replace(group, sequences=group.sequences + group.sequences),
        "ranks": replace(group, ranks=(0, 0, 1, 2)),
        "devices": replace(group, ranks=tuple(rank + 4 for rank in group.ranks)),
        "tokens": replace(group, tokens=1),
        "take": replace(group, predicted_ms=group.predicted_ms / 2),
    }
    for wrong in broken.values():
        batches = (replace(batch, groups=(wrong, *batch.groups[1:])), *plan.micro_batches[1:])
        with pytest.raises(PlanError):
            replace(plan, micro_batches=batches).verify(problem)
    with pytest.raises(PlanError, match="run 0 times"):
        replace(plan, micro_batches=plan.micro_batches[1:]).verify(problem)


def test_best_fixed_degree_is_one_degree_for_all_steps() -> None:
    cluster = Cluster(devices=4, memory_bytes=16384.0)
    steps = [ScatterProblem(tuple(lengths), cluster, SMALL) for lengths in ([30000], [10] * 40)]
    plans = best_fixed_degree(steps)
    used = {group.degree for plan in plans for b in plan.micro_batches for group in b.groups}
    assert len(used) == 1
    assert used <= {2, 4}  # 30,000 tokens need two devices of 16,384
    for plan, problem in zip(plans, steps, strict=True):
        plan.verify(problem)


def test_a_sequence_that_fits_nowhere_says_what_would_help() -> None:
    with pytest.raises(InfeasiblePlanError, match=r"sequence 1 has 70000 tokens.*holds 65536") as e:
        ScatterProblem((5, 70_000), Cluster(devices=4, memory_bytes=16384.0), SMALL)
    assert (e.value.needed_tokens, e.value.available_tokens) == (70_000, 65_536)
    assert "take 8 devices as one group (now 4 in all)" in str(e.value)
    assert "cut the sequence to 65536" in str(e.value)
    with pytest.raises(InfeasiblePlanError, match=r"allow groups of 8 devices \(now at most 4\)"):
        ScatterProblem(
            (70_000,), Cluster(devices=8, memory_bytes=16384.0, degrees=(1, 2, 4)), SMALL
        )


@pytest.mark.parametrize("per_node", [6, 7, 8, 12, 48])
def test_the_degree_that_would_help_does(per_node: int) -> None:
    """What the refusal names can be placed on these nodes, and is the least that can."""
    cluster = Cluster(devices=48, devices_per_node=per_node, memory_bytes=16384.0, degrees=(1,))
    with pytest.raises(InfeasiblePlanError) as error:
        ScatterProblem((70_000,), cluster, SMALL)
    named = re.search(r"allow groups of (\d+) devices", str(error.value))
    assert named
    least = {6: 6, 7: 7, 8: 8, 12: 6, 48: 6}  # 5 devices hold 70,000 tokens
    assert int(named[1]) == least[per_node]
    ScatterProblem((70_000,), replace(cluster, degrees=(1, int(named[1]))), SMALL)


@pytest.mark.parametrize(("devices", "per_node", "enough"), [(3, 0, 4), (12, 6, 24), (6, 3, 12)])
def test_the_devices_that_would_help_do(devices: int, per_node: int, enough: int) -> None:
    cluster = Cluster(devices=devices, devices_per_node=per_node, memory_bytes=1024.0)
    lengths = (1024 * devices + 1,)
    with pytest.raises(InfeasiblePlanError, match="as one group") as error:
        ScatterProblem(lengths, cluster, SMALL)
    named = re.search(r"take (\d+) devices", str(error.value))
    assert named
    assert int(named[1]) == enough
    wider = Cluster(devices=enough, devices_per_node=per_node, memory_bytes=1024.0)
    ScatterProblem(lengths, replace(wider, degrees=(wider.devices,)), SMALL)


def test_the_memory_that_would_help_does() -> None:
    """What the refusal names, to the digit: it is rounded up, for any length."""
    for length in (70_000, 71_003, 123_457, 999_999):
        with pytest.raises(InfeasiblePlanError) as error:
            ScatterProblem((length,), Cluster(devices=4, memory_bytes=16384.0), SMALL)
        named = re.search(r"give each device ([\d.e+-]+) GiB", str(error.value))
        assert named
        enough = float(named[1]) * 2**30
        ScatterProblem((length,), Cluster(devices=4, memory_bytes=enough), SMALL)
        with pytest.raises(InfeasiblePlanError):
            ScatterProblem((length,), Cluster(devices=4, memory_bytes=0.998 * enough), SMALL)


@pytest.mark.parametrize(
    ("lengths", "match"),
    [((), "no lengths"), ((4, 0), "length 1"), ((1.5,), "0"), ((4, float("inf")), "length 1")],
)
def test_bad_lengths(lengths: tuple[int, ...], match: str) -> None:
    with pytest.raises(PlanError, match=match):
        ScatterProblem(lengths, FLEXSP, preset("flexsp-7b"))


def test_planning_imports_no_torch_and_nothing_heavy() -> None:
    code = """
import sys
import seqpar.planners.calibrate, seqpar.planners.correction, seqpar.planners.lengths
import seqpar.planners.milp, seqpar.planners.plot, seqpar.planners.simulate
from seqpar.planners import Cluster, Planner, ScatterProblem, best_fixed_degree, preset
cluster = Cluster(devices=64, memory_bytes=28 * 2**30)
problem = ScatterProblem((90_000, 500, 20), cluster, preset("flexsp-7b"))
plan, fixed = Planner(time_limit_ms=5).plan(problem), best_fixed_degree(problem)[0]
assert plan.makespan_ms <= fixed.makespan_ms
heavy = ("torch", "numba", "pulp", "highspy", "matplotlib", "scipy", "ray", "pydantic")
print([name for name in heavy if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
