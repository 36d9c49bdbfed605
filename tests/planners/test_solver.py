"""The parts of the anytime planner: packing, placement, cascades, determinism, odd clusters."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from seqpar.errors import PlanError
from seqpar.planners import Cluster, Planner, ScatterProblem, preset
from seqpar.planners.baselines import fixed_degree, megatron_dynamic
from seqpar.planners.batch import SortedBatch
from seqpar.planners.cascade import pack_micro_batch
from seqpar.planners.cost import Link
from seqpar.planners.improve import improve
from seqpar.planners.microbatch import best_cuts, blaster_cuts, safe_packings
from seqpar.planners.packing import Waiting, makespan, pack_most, spread
from seqpar.planners.plan import place_groups, to_plan
from tests.planners.test_plan import FLEXSP, SMALL, flexsp_problem

BATCH = SortedBatch.of(flexsp_problem(3, count=200))


@pytest.mark.parametrize("target_ms", [1500.0, 3000.0, 12_000.0])
def test_pack_most_keeps_target_memory_and_devices(target_ms: float) -> None:
    packed = pack_most(BATCH, Waiting(BATCH, range(200)), target_ms, max_left_tokens=math.inf)
    placed = [k for _, members in packed.packing for k in members]
    assert sorted(placed + packed.left_over) == list(range(200))
    assert sum(BATCH.degree_lines[d].degree for d, _ in packed.packing) <= 64
    for d, members in packed.packing:
        line = BATCH.degree_lines[d]
        assert sum(BATCH.tokens[k] for k in members) <= line.capacity
        assert line.fixed + sum(BATCH.weights[d][k] for k in members) <= target_ms * (1 + 1e-9)
    assert packed.makespan_ms == pytest.approx(makespan(BATCH, packed.packing))


def test_pack_most_leaves_over_only_what_fits_nowhere() -> None:
    packed = pack_most(BATCH, Waiting(BATCH, range(200)), 2500.0, max_left_tokens=math.inf)
    assert packed.left_over
    used = sum(BATCH.degree_lines[d].degree for d, _ in packed.packing)
    shortest = packed.left_over[-1]
    for d, line in enumerate(BATCH.degree_lines):
        fresh = line.capacity >= BATCH.tokens[shortest] and (
            line.fixed + BATCH.weights[d][shortest] <= 2500
        )
        assert not (fresh and line.degree <= 64 - used)


def test_improve_never_worsens_and_keeps_every_sequence() -> None:
    degrees = [5, 4, 3, 3]
    members = range(40, 200)
    packing = spread(BATCH, members, degrees)
    assert packing is not None
    better = improve(BATCH, packing, max_steps=100)
    assert makespan(BATCH, better) <= makespan(BATCH, packing)
    assert sorted(k for _, group in better for k in group) == list(members)
    for d, group in better:
        assert sum(BATCH.tokens[k] for k in group) <= BATCH.degree_lines[d].capacity


def test_improve_evens_out_a_lopsided_packing() -> None:
    members = list(range(150, 200))
    better = improve(BATCH, [(2, members), (2, [])], max_steps=200)
    ends = [BATCH.degree_lines[d].fixed + sum(BATCH.weights[d][k] for k in g) for d, g in better]
    assert max(ends) <= 1.01 * min(ends)


def test_a_group_without_sequences_is_not_the_slowest() -> None:
    """Though it would be: a wide group's latency may be longer than what short sequences take."""
    slow = replace(SMALL, links=(Link(degree=2, gib_per_s=10.0, latency_ms=1000.0),))
    problem = ScatterProblem((30, 20, 10), Cluster(devices=4, memory_bytes=16384.0), slow)
    batch = SortedBatch.of(problem)
    better = improve(batch, [(0, [0, 1, 2]), (0, []), (1, [])], max_steps=10)
    assert sorted(sorted(group) for _, group in better) == [[], [0], [1, 2]]
    links = (Link(degree=2, gib_per_s=1e-2, latency_ms=5.0), Link(degree=4, gib_per_s=1e-3))
    slower = replace(SMALL, fixed_ms=0.0, links=links)
    narrow = Cluster(devices=4, devices_per_node=2, memory_bytes=7764.0)
    problem = ScatterProblem((1685, 1701, 3449), narrow, slower)
    Planner(time_limit_ms=2000, repeatable=True).plan(problem).verify(problem)


def test_safe_packings_always_fit() -> None:
    problem = flexsp_problem(5)
    batch = SortedBatch.of(problem)
    to_plan(problem, batch, safe_packings(batch)).verify(problem)


def test_cuts_cover_the_batch_within_memory() -> None:
    batch = SortedBatch.of(flexsp_problem(6))
    for cuts in (best_cuts(batch, fill=1.0), blaster_cuts(batch, 6)):
        assert cuts is not None
        assert (cuts[0], cuts[-1]) == (0, 512)
        assert all(a < b for a, b in pairwise(cuts))
        assert all(sum(batch.tokens[a:b]) <= 64 * 6000 for a, b in pairwise(cuts))


def test_more_time_is_never_worse_and_plans_come_one_better_than_the_other() -> None:
    problem = flexsp_problem(1)
    times = [plan.makespan_ms for plan in Planner(time_limit_ms=150).plans(problem)]
    assert times == sorted(times, reverse=True)
    short = Planner(time_limit_ms=15, baselines=False).plan(problem).makespan_ms
    assert times[-1] <= short


@pytest.mark.parametrize(
    ("devices", "per_node", "degrees"),
    [(6, 6, (1, 2, 3, 6)), (12, 6, (1, 2, 3, 6, 12)), (7, 7, ()), (24, 8, ()), (3, 3, (3,))],
)
def test_odd_clusters(devices: int, per_node: int, degrees: tuple[int, ...]) -> None:
    cluster = Cluster(
        devices=devices, devices_per_node=per_node, memory_bytes=16384.0, degrees=degrees
    )
    rng = np.random.default_rng(devices)
    largest = max(cluster.degrees) * 16384
    lengths = tuple(rng.integers(1, largest // 2, 30).tolist())
    problem = ScatterProblem(lengths, cluster, SMALL)
    plan = Planner(time_limit_ms=20).plan(problem)
    plan.verify(problem)
    assert {g.degree for batch in plan.micro_batches for g in batch.groups} <= set(cluster.degrees)


def test_groups_are_placed_within_nodes() -> None:
    cluster = Cluster(devices=16, devices_per_node=8, memory_bytes=1.0)
    assert place_groups([8, 4, 2, 1], cluster) == [
        tuple(range(8)),
        (8, 9, 10, 11),
        (12, 13),
        (14,),
    ]
    assert place_groups([16, 1], cluster) is None
    assert place_groups([4, 4, 8], cluster) == [(0, 1, 2, 3), (4, 5, 6, 7), tuple(range(8, 16))]


def test_a_degree_that_would_straddle_nodes_is_refused() -> None:
    with pytest.raises(PlanError, match="degree 3 does not fit nodes of 8"):
        Cluster(devices=16, devices_per_node=8, memory_bytes=1.0, degrees=(3,))


def test_baselines_are_what_they_say() -> None:
    problem = flexsp_problem(4)
    plan = fixed_degree(problem, 64)
    plan.verify(problem)
    assert {g.degree for batch in plan.micro_batches for g in batch.groups} == {64}
    rule = megatron_dynamic(problem)
    rule.verify(problem)
    largest = max(problem.lengths)
    group = next(
        g
        for batch in rule.micro_batches
        for g in batch.groups
        if problem.lengths.index(largest) in g.sequences
    )
    assert group.degree == next(
        line.degree for line in problem.degree_costs if line.capacity >= largest
    )


def test_a_context_rules_out_small_fixed_degrees() -> None:
    short = ScatterProblem((500,) * 64, FLEXSP, preset("flexsp-7b"))
    long = replace(short, context_tokens=196_608)
    assert Planner().plan(short).baselines["fixed_degree"] < 2000
    assert Planner().plan(long).baselines["fixed_degree"] == pytest.approx(
        fixed_degree(short, 64).makespan_ms
    )


def test_one_micro_batch_is_packed_near_its_bound() -> None:
    packing = pack_micro_batch(BATCH, list(range(60, 200)))
    assert packing is not None
    assert makespan(BATCH, packing) < 1.1 * BATCH.degree_lines[0].fixed + 0.2 * 6000
