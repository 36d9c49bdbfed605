"""Plans are executed exactly: any mix of degrees gives the gradient of the step's mean loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqpar import comm
from seqpar.adapters.families import family_of
from seqpar.adapters.tiny import tiny_model
from seqpar.calibration import Calibration, calibrate_model, measured_shapes
from seqpar.calibration_memory import saved_bytes_per_token
from seqpar.comparison import FixedDegreeRival
from seqpar.data import DocumentSampler, PlannedStep, PlannedSteps, recorded_plans
from seqpar.feedback import CostFeedback
from seqpar.mesh import GroupPool
from seqpar.models import Decoder, hybrid
from seqpar.planners import (
    Cluster,
    CostModel,
    Group,
    LayerCost,
    MicroBatch,
    Planner,
    ScatterPlan,
    ScatterProblem,
)
from seqpar.training import Parity, PlanExecutor, StepResult
from seqpar.wrap import parallelize
from tests.ranks import run_ranks

LENGTHS = [61, 1, 9, 30, 2, 17, 1, 44]


def _documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(40, (length,), generator=generator) for length in LENGTHS]


def _group(ranks: tuple[int, ...], sequences: tuple[int, ...]) -> Group:
    tokens = sum(LENGTHS[i] for i in sequences)
    return Group(ranks, len(ranks), "ring" if len(ranks) > 1 else "local", sequences, 1.0, tokens)


def _plan(*micro_batches: tuple[Group, ...]) -> ScatterPlan:
    return ScatterPlan(tuple(MicroBatch(1.0, groups) for groups in micro_batches))


# Degrees 1, 2 and 4 together, ranks left idle, and unequal numbers of micro-batches a rank.
MIXED = _plan(
    (_group((0, 1, 2, 3), (0, 1)),),
    (_group((0, 1), (3, 2)), _group((2,), (4, 6))),
    (_group((3,), (5,)), _group((0,), (7,))),
)


def _executor(seed: int = 0) -> PlanExecutor:
    torch.manual_seed(seed)
    config = hybrid(
        vocab_size=40,
        dim=16,
        num_layers=2,
        num_heads=2,
        hidden=16,
        softmax_every=2,
        softmax_heads=2,
        softmax_kv_heads=1,
        softmax_head_dim=8,
        softmax_strategy="ring",
    )
    return PlanExecutor(
        Decoder(config), GroupPool(), world=dist.group.WORLD, device=torch.device("cpu")
    )


def _parity(rank: int, planted: str) -> tuple[Parity, float, float]:
    executor = _executor()
    if planted == "lost document":
        executor._backward = _losing_a_document(executor._backward)
    if planted == "wrong weight" and rank == 2:
        with torch.no_grad():
            executor.model.head.weight[0, 0] += 1.0
    parity = executor.check_parity(MIXED, _documents())
    return (
        parity,
        executor.forward_backward(MIXED, _documents()).loss,
        executor.mean_loss(_documents()),
    )


def _losing_a_document(backward: Any) -> Any:
    def losing(documents: Any, group: Any, num_targets: int, *strategy: Any) -> torch.Tensor:
        kept = documents[:1] if group is not None else documents
        return backward(kept, group, num_targets, *strategy)

    return losing


def test_a_mixed_plan_equals_one_process() -> None:
    results = run_ranks(4, _parity, "")
    for parity, loss, heldout in results:
        assert parity.relative_error < 1e-5
        assert parity == results[0][0], "every rank is told the same"
        # The same documents each on one rank: the same mean over targets.
        assert abs(loss - heldout) < 1e-5 * heldout


def _wrapped_executor() -> PlanExecutor:
    torch.manual_seed(0)
    model = parallelize(tiny_model(family_of("llama")), None)
    return PlanExecutor(model, GroupPool(), world=dist.group.WORLD, device=torch.device("cpu"))


def _wrapped_parity(rank: int) -> Parity:
    return _wrapped_executor().check_parity(MIXED, _documents())


def test_a_wrapped_model_runs_plans() -> None:
    assert run_ranks(4, _wrapped_parity)[0].relative_error < 1e-5


def _traffic_by_strategy(rank: int, wrapped: bool) -> list[tuple[dict[str, int], float]]:
    """For every strategy of a plan: calls by operation, and the step's error against one rank."""
    executor = _wrapped_executor() if wrapped else _executor()
    found = []
    for strategy in ("ring", "ulysses"):
        group = replace(_group((0, 1), (0, 3, 7)), strategy=strategy)
        plan = _plan((group, _group((2,), (1, 2, 4, 5, 6))))
        with comm.count_traffic() as traffic:
            executor.forward_backward(plan, _documents())
        parity = executor.check_parity(plan, _documents())
        calls = {name: operation.calls for name, operation in traffic.operations.items()}
        found.append((calls, parity.relative_error))
    return found


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_group_exchanges_as_its_plan_says(wrapped: bool) -> None:
    ring, ulysses = run_ranks(4, _traffic_by_strategy, wrapped)[0]
    assert max(ring[1], ulysses[1]) < 1e-5
    # Trading heads takes two exchanges a pass, there and back; a ring of two takes one.
    assert ulysses[0]["exchange"] == 2 * ring[0]["exchange"] > 0


@pytest.mark.parametrize("planted", ["lost document", "wrong weight"])
def test_parity_notices_what_is_wrong(planted: str) -> None:
    parity, _, _ = run_ranks(4, _parity, planted)[0]
    assert parity.relative_error > 1e-3


COST = CostModel(
    name="test",
    layers=(LayerCost(kind="softmax", quadratic_ms=1e-3, linear_ms=0.1),),
    memory_bytes_per_token=1.0,
)


def _cluster() -> Cluster:
    return Cluster(devices=1, memory_bytes=1000.0, degrees=(1,))


def _planned_steps(rank: int, first_step: int, position: int, record: Any) -> list[PlannedStep]:
    def plan_documents(step: int, lengths: Any) -> ScatterPlan:
        assert rank == 0, "only rank 0 plans"
        return Planner(time_limit_ms=5).plan(ScatterProblem(tuple(lengths), _cluster(), COST))

    sampler = DocumentSampler(LENGTHS, budget_tokens=90, seed=4, position=position)
    steps = PlannedSteps(
        sampler, plan_documents, group=dist.group.WORLD, first_step=first_step, record=record
    )
    taken = [next(steps) for _ in range(6 - first_step)]
    steps.close()
    return taken


def test_planned_steps_are_the_same_everywhere_resume_and_replay(tmp_path: Any) -> None:
    record = tmp_path / "plans.jsonl"
    first, second = run_ranks(2, _planned_steps, 0, 0, record)
    assert first == second
    assert [planned.step for planned in first] == list(range(6))
    resumed = run_ranks(1, _planned_steps, 3, first[2].position, None)[0]
    assert [(p.documents, p.plan.micro_batches) for p in resumed] == [
        (p.documents, p.plan.micro_batches) for p in first[3:]
    ]
    replay = recorded_plans(record)
    for planned in first:
        lengths = [LENGTHS[i] for i in planned.documents]
        assert replay(planned.step, lengths) == planned.plan


def _calibrated(rank: int) -> tuple[float, float, float]:
    executor = _executor()
    calibration = calibrate_model(executor, degrees=[1, 2], vocab_size=40, longest_tokens=512)
    cost = calibration.cost
    assert all(p.grad is None for p in executor.model.parameters())
    return (
        cost.group_ms([2048], 1),
        cost.group_ms([512], 1),
        saved_bytes_per_token(executor, vocab_size=40),
    )


def test_calibration_tells_long_from_short_and_counts_memory() -> None:
    for long_ms, short_ms, bytes_per_token in run_ranks(2, _calibrated):
        assert long_ms > 1.5 * short_ms > 0
        # Two layers of width 16 in float32 keep several activations of at least 64 bytes each.
        assert 20 * 64 < bytes_per_token < 200 * 64


def _calibrated_late(rank: int) -> Calibration:
    return calibrate_model(
        _executor(), degrees=[1, 2], vocab_size=40, longest_tokens=512, limit_s=0.0
    )


def test_a_calibration_that_is_late_measures_what_tells_the_constants_and_no_more() -> None:
    first, second = run_ranks(2, _calibrated_late)
    shapes = [list(measured_shapes(degree, 512)) for degree in (1, 2)]
    rows = [(1, lengths) for lengths in shapes[0][:3]] + [(2, lengths) for lengths in shapes[1][:2]]
    for found in (first, second):
        assert [(row.degree, row.lengths) for row in found.measurements] == rows
        assert len(found.first_ms) == len(rows)
        assert [link.degree for link in found.cost.links] == [2]
        for row in found.measurements:  # as many rows as constants
            off = abs(found.cost.group_ms(row.lengths, row.degree) - row.ms) / row.ms
            assert off <= found.cost.errors["worst_relative"] + 1e-9
    assert first.cost == second.cost


def _rivalry(rank: int) -> tuple[Any, bool]:
    executor = _executor()
    one_degree = _plan((_group((0, 1), tuple(range(len(LENGTHS)))),))
    mixed = _plan((_group((0,), (0, 1, 2)), _group((1,), (3, 4, 5, 6, 7))))
    rival = FixedDegreeRival(executor, {0: one_degree, 2: one_degree})
    kept = True
    for step in range(4):
        executor.model.zero_grad(set_to_none=True)
        rival.forward_backward(PlannedStep(step, (), mixed, 0, 0.0, 0.0), _documents())
        gradients = [p.grad.clone() for p in executor.model.parameters()]
        executor.model.zero_grad(set_to_none=True)
        executor.forward_backward(mixed, _documents())
        kept &= all(
            torch.allclose(p.grad, g, rtol=1e-4, atol=1e-7)
            for p, g in zip(executor.model.parameters(), gradients, strict=True)
        )
    return rival.result(), kept


def test_the_rival_runs_beside_the_plan_and_leaves_its_gradients() -> None:
    comparison, kept = run_ranks(2, _rivalry)[0]
    assert kept
    assert comparison.fixed_degree == 2
    assert comparison.batches == len(comparison.planned_ms) == 2
    assert comparison.speedup == sum(comparison.fixed_ms) / sum(comparison.planned_ms)


def test_feedback_learns_the_machine_from_the_steps_that_ran() -> None:
    slower = CostModel(
        name="slower",
        layers=(LayerCost(kind="softmax", quadratic_ms=2e-3, linear_ms=0.2),),
        memory_bytes_per_token=1.0,
    )
    feedback = CostFeedback(COST)
    assert feedback.cost == COST
    plan = _plan((_group((0,), (0, 3)), _group((1,), (5,))), (_group((0,), (7, 2)),))
    documents = tuple(reversed(range(len(LENGTHS))))  # sequence i of the plan is document 7 - i
    lengths = list(reversed(LENGTHS))
    measured = [
        [slower.group_ms([LENGTHS[i] for i in group.sequences], 1) for group in micro.groups]
        for micro in plan.micro_batches
    ]
    spans = tuple(tuple((5.0, 5.0 + ms) for ms in times) for times in measured)
    result = StepResult(1.0, 0, 0, 1.0, spans)
    for step in range(20):
        feedback.observe(PlannedStep(step, documents, plan, 0, 0.0, 0.0), result, lengths)
    assert feedback.cost.group_ms([61, 30], 1) == pytest.approx(measured[0][0], rel=0.05)
    resumed = CostFeedback(COST, feedback.observations)
    assert resumed.cost == feedback.cost
    for step in range(200):
        feedback.observe(PlannedStep(step, documents, plan, 0, 0.0, 0.0), result, lengths)
    assert len(feedback.observations) == 512, "the latest alone count"
