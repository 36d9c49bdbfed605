"""Documents are drawn once an epoch, resumably; plans reach every rank in one message."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqpar import comm
from seqpar.data import (
    DocumentSampler,
    PlannedStep,
    PlannedSteps,
    limit_documents,
    recorded_plans,
)
from seqpar.errors import DataError, InfeasiblePlanError
from seqpar.mesh import GroupPool
from seqpar.planners import (
    Cluster,
    CostModel,
    Exchange,
    LayerCost,
    Link,
    Planner,
    ScatterPlan,
    ScatterProblem,
    preset,
)
from seqpar.training import PlanExecutor
from tests.planners.test_plan import FLEXSP, lognormal
from tests.ranks import run_ranks

LENGTHS = [1, 700, 30, 999, 4, 4, 250, 61, 1000, 12]


def test_every_document_is_drawn_once_an_epoch_within_the_budget() -> None:
    sampler = DocumentSampler(LENGTHS, budget_tokens=1000, seed=3)
    drawn: list[int] = []
    while sampler.position < 5 * len(LENGTHS):
        step = sampler.draw()
        assert 0 < sum(LENGTHS[i] for i in step) <= 1000
        drawn += step
    for epoch in range(5):
        of_epoch = drawn[epoch * len(LENGTHS) : (epoch + 1) * len(LENGTHS)]
        assert Counter(of_epoch) == Counter(range(len(LENGTHS)))
    assert drawn[:10] != drawn[10:20], "epochs are shuffled anew"


@pytest.mark.parametrize("steps_before", [0, 1, 7])
def test_a_position_resumes_exactly(steps_before: int) -> None:
    whole = DocumentSampler(LENGTHS, budget_tokens=1200, seed=5)
    expected = [whole.draw() for _ in range(20)]
    first = DocumentSampler(LENGTHS, budget_tokens=1200, seed=5)
    before = [first.draw() for _ in range(steps_before)]
    again = DocumentSampler(LENGTHS, budget_tokens=1200, seed=5, position=first.position)
    assert before + [again.draw() for _ in range(20 - steps_before)] == expected


def test_documents_over_the_limit_are_split_or_dropped() -> None:
    documents = [torch.arange(n) for n in (0, 1, 10, 25)]
    split = limit_documents(documents, context_tokens=10, over_limit="split")
    assert [len(d) for d in split] == [1, 10, 10, 10, 5]
    assert torch.equal(torch.cat(split[2:]), documents[3])
    dropped = limit_documents(documents, context_tokens=10, over_limit="drop")
    assert [len(d) for d in dropped] == [1, 10]


def test_unusable_documents_are_refused() -> None:
    with pytest.raises(DataError, match="no document left"):
        limit_documents([torch.arange(5)], context_tokens=4, over_limit="drop")
    with pytest.raises(DataError, match="at least 1"):
        limit_documents([torch.arange(5)], context_tokens=0, over_limit="split")
    with pytest.raises(DataError, match="document 1 has no token"):
        DocumentSampler([3, 0], budget_tokens=5, seed=0)
    with pytest.raises(DataError, match="raise the budget or split"):
        DocumentSampler([3, 9], budget_tokens=5, seed=0)
    with pytest.raises(DataError, match="no documents"):
        DocumentSampler([], budget_tokens=5, seed=0)


COST = CostModel(
    name="test",
    layers=(LayerCost(kind="softmax", quadratic_ms=1e-3, linear_ms=0.1),),
    exchanges=(Exchange(strategy="ring", bytes_per_token=1e3),),
    links=(Link(degree=2, gib_per_s=1.0),),
    memory_bytes_per_token=1.0,
)
CLUSTER = Cluster(devices=2, memory_bytes=700.0)


def _train(rank: int, replay: Path | None, record: Path | None) -> tuple[list[Any], list[Any]]:
    """Three planned steps: their plans, and the model's parameters afterwards."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(97, (n,), generator=generator) for n in LENGTHS]
    model = torch.nn.Sequential(torch.nn.Embedding(97, 8), torch.nn.Linear(8, 97))
    executor = PlanExecutor(
        _IgnoringLayout(model), GroupPool(), world=dist.group.WORLD, device=torch.device("cpu")
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)

    def plan_documents(step: int, lengths: Any) -> ScatterPlan:
        return Planner(time_limit_ms=5 + step).plan(ScatterProblem(tuple(lengths), CLUSTER, COST))

    steps = PlannedSteps(
        DocumentSampler(LENGTHS, budget_tokens=1400, seed=2),
        recorded_plans(replay) if replay else plan_documents,
        group=dist.group.WORLD,
        record=record,
    )
    plans = []
    for _ in range(3):
        planned = next(steps)
        plans.append(planned.plan.micro_batches)
        executor.forward_backward(planned.plan, [documents[i] for i in planned.documents])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    steps.close()
    return plans, [parameter.detach().numpy().tobytes() for parameter in model.parameters()]


class _IgnoringLayout(torch.nn.Module):
    """A model without attention: every token for itself, wherever it lies."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids)
        return logits


def test_replayed_plans_give_the_same_bits(tmp_path: Path) -> None:
    record = tmp_path / "plans.jsonl"
    plans, bits = run_ranks(2, _train, None, record)[0]
    again, same_bits = run_ranks(2, _train, record, None)[0]
    assert any(group.degree == 2 for step in plans for batch in step for group in batch.groups)
    assert again == plans
    assert same_bits == bits


def _messages_of_a_step(rank: int) -> tuple[int, int]:
    """Collectives of one step's plan, of 512 sequences on 64 devices, and its bytes."""
    lengths = lognormal(0)

    def plan_documents(step: int, drawn: Any) -> ScatterPlan:
        return Planner(time_limit_ms=20).plan(
            ScatterProblem(tuple(drawn), FLEXSP, preset("flexsp-7b"))
        )

    steps = PlannedSteps(
        DocumentSampler(lengths, budget_tokens=sum(lengths), seed=0),
        plan_documents,
        group=dist.group.WORLD,
    )
    with comm.count_traffic() as traffic:
        planned = next(steps)
    steps.close()
    return traffic.calls, len(planned.to_json())


def test_one_message_carries_a_plan() -> None:
    for calls, message_bytes in run_ranks(2, _messages_of_a_step):
        assert calls == 1
        assert message_bytes > 10_000


def test_a_recording_of_other_documents_or_torn_is_refused(tmp_path: Path) -> None:
    problem = ScatterProblem((600, 30, 7), CLUSTER, COST)
    plan = Planner(time_limit_ms=5).plan(problem)
    line = PlannedStep(0, (4, 5, 6), plan, 3, 0.0, 0.0).to_json()
    record = tmp_path / "plans.jsonl"
    record.write_text(line + "\n" + line[:50])
    replay = recorded_plans(record)
    assert replay(0, [600, 30, 7]) == plan
    with pytest.raises(DataError, match="has no plan for step 1"):
        replay(1, [600, 30, 7])
    with pytest.raises(DataError, match="plans 3 documents, not 2"):
        replay(0, [600, 30])
    with pytest.raises(DataError, match="it recorded other documents"):
        replay(0, [600, 30, 8])
    record.write_text(line[:50] + "\n" + line)
    with pytest.raises(DataError, match="line 1, is no planned step"):
        recorded_plans(record)
    with pytest.raises(DataError, match="cannot read the recording"):
        recorded_plans(tmp_path / "nowhere")


def _fails_to_plan(rank: int) -> str:
    def plan_documents(step: int, lengths: Any) -> ScatterPlan:
        return Planner().plan(ScatterProblem((5000,), CLUSTER, COST))

    sampler = DocumentSampler(LENGTHS, budget_tokens=1400, seed=2)
    steps = PlannedSteps(sampler, plan_documents, group=dist.group.WORLD)
    with pytest.raises(InfeasiblePlanError) as caught:
        next(steps)
    steps.close()
    return str(caught.value)


def test_a_step_that_cannot_be_planned_is_told_to_every_rank() -> None:
    first, second = run_ranks(2, _fails_to_plan)
    assert first == second
    assert "sequence 0 has 5000 tokens" in first
