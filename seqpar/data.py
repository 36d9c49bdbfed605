"""Documents -> planned steps, the same on every rank, resumable at any step.

A step draws documents up to a token budget, rank 0 has it planned in the background, while the
steps before train, and one message carries the plan to all ranks. The background is a thread that
waits; a plan function that plans in a `PlannerProcess` leaves the training process alone.

The position in the data is one integer, the number of documents drawn since the start, so that a
checkpoint holds it and a resumed run neither loses nor repeats a document.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.errors import DataError
from seqpar.planners import ScatterPlan

__all__ = ["DocumentSampler", "PlannedStep", "PlannedSteps", "limit_documents", "recorded_plans"]

PlanDocuments = Callable[[int, Sequence[int]], ScatterPlan]
"""(step, lengths of its documents) -> the plan: a planner, or a recording of one."""


def limit_documents(
    documents: Sequence[Tensor], *, context_tokens: int, over_limit: Literal["split", "drop"]
) -> list[Tensor]:
    """Documents of at most `context_tokens` tokens: longer ones split into pieces, or dropped.

    Args:
        documents: 1-D tensors of token ids. Empty ones are left out: they hold nothing to train on.
        context_tokens: the limit, in tokens.
        over_limit: "split" cuts a long document every `context_tokens`; "drop" leaves it out.

    Raises:
        DataError: a limit below 1, or nothing left.
    """
    if context_tokens < 1:
        raise DataError(f"context_tokens must be at least 1, got {context_tokens}")
    kept: list[Tensor] = []
    for document in documents:
        if over_limit == "drop" and len(document) > context_tokens:
            continue
        kept += [piece for piece in torch.split(document, context_tokens) if len(piece)]
    if not kept:
        raise DataError(
            f"no document left of {len(documents)} under {context_tokens=} with {over_limit=}: "
            "raise the limit or split"
        )
    return kept


class DocumentSampler:
    """Draws every document once an epoch, in an order that the seed decides.

    Args:
        lengths: tokens of each document.
        budget_tokens: a draw takes documents, in order, while their total stays within it.
        seed: epoch e is shuffled by (seed, e).
        position: documents drawn before, from a checkpoint.

    Raises:
        DataError: no documents, an empty document, or one longer than the budget.
    """

    def __init__(
        self, lengths: Sequence[int], *, budget_tokens: int, seed: int, position: int = 0
    ) -> None:
        if not len(lengths):
            raise DataError("there are no documents to draw from")
        if min(lengths) < 1:
            raise DataError(f"document {int(np.argmin(lengths))} has no token: leave it out")
        if max(lengths) > budget_tokens:
            raise DataError(
                f"a document of {max(lengths)} tokens can never be drawn with "
                f"budget_tokens={budget_tokens}: raise the budget or split the document"
            )
        self.lengths = [int(length) for length in lengths]
        self.budget_tokens = budget_tokens
        self.seed = seed
        self.position = position
        self._epoch = -1
        self._order = np.zeros(0, dtype=np.int64)

    def draw(self) -> tuple[int, ...]:
        """Indices of the next documents; `position` moves past them."""
        drawn: list[int] = []
        total = 0
        while total + self.lengths[document := self._document_at(self.position)] <= (
            self.budget_tokens
        ):
            drawn.append(document)
            total += self.lengths[document]
            self.position += 1
        return tuple(drawn)

    def _document_at(self, position: int) -> int:
        epoch, index = divmod(position, len(self.lengths))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, epoch)).permutation(len(self.lengths))
            self._epoch = epoch
        return int(self._order[index])


@dataclass(frozen=True)
class PlannedStep:
    """What every rank knows of one step before it trains.

    `documents[i]` is the document that the plan calls sequence i. `position` is the sampler's
    after this step: a checkpoint taken after the step stores it. `plan_ms` is what planning took
    in the background, `wait_ms` the part of it that the step had to wait for.
    """

    step: int
    documents: tuple[int, ...]
    plan: ScatterPlan
    position: int
    plan_ms: float
    wait_ms: float

    def to_json(self) -> str:
        fields = {**vars(self), "plan": self.plan.to_json()}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, text: str) -> PlannedStep:
        fields = json.loads(text)
        fields["plan"] = ScatterPlan.from_json(fields["plan"])
        fields["documents"] = tuple(fields["documents"])
        return cls(**fields)


class PlannedSteps(Iterator[PlannedStep]):
    """An endless iterator of planned steps; rank 0 plans ahead, the others receive.

    The first steps are being planned as soon as it is made.

    Args:
        sampler: where documents come from; only rank 0's is drawn from.
        plan_documents: plans one step; called on rank 0 only, in a thread of its own, which should
            do no more than wait: `PlannerProcess.plan` does the work elsewhere.
        group: all ranks of the job; None for a job of one rank.
        first_step: number of the next step, from a checkpoint.
        lookahead: how many steps are planned ahead.
        record: a JSON-lines file to which rank 0 appends every step, for `recorded_plans`.
    """

    def __init__(
        self,
        sampler: DocumentSampler,
        plan_documents: PlanDocuments,
        *,
        group: ProcessGroup | None,
        first_step: int = 0,
        lookahead: int = 2,
        record: Path | None = None,
    ) -> None:
        self.sampler = sampler
        self.plan_documents = plan_documents
        self.group = group
        self.record = record
        self._next_to_plan = first_step
        self._lookahead = lookahead
        self._is_source = comm.group_rank(group) == 0
        self._worker = ThreadPoolExecutor(1, "seqpar-planner") if self._is_source else None
        self._pending: list[Future[PlannedStep]] = []
        if self._is_source:
            self._plan_ahead()

    def __next__(self) -> PlannedStep:
        """The next step. What planning it raised on rank 0 is raised on every rank."""
        message: str | Exception = ""
        if self._is_source:
            try:
                message = self._next_planned().to_json()
            except Exception as error:
                message = error
        message = cast(
            "str | Exception", comm.broadcast_object(message, group=self.group, source=0)
        )
        if isinstance(message, Exception):
            raise message
        if self._is_source and self.record is not None:
            with self.record.open("a") as lines:
                lines.write(message + "\n")
        return PlannedStep.from_json(message)

    def close(self) -> None:
        """Stop planning; the steps planned ahead are forgotten (their documents were not used)."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)

    def _plan_ahead(self) -> None:
        """Have the next steps planned, as many as are to be ready."""
        assert self._worker is not None
        while len(self._pending) <= self._lookahead:
            self._pending.append(self._worker.submit(self._plan, self._next_to_plan))
            self._next_to_plan += 1

    def _next_planned(self) -> PlannedStep:
        self._plan_ahead()
        start = time.perf_counter()
        planned = self._pending.pop(0).result()
        wait_ms = (time.perf_counter() - start) * 1e3
        return PlannedStep(**{**vars(planned), "wait_ms": wait_ms})

    def _plan(self, step: int) -> PlannedStep:
        documents = self.sampler.draw()
        position = self.sampler.position
        start = time.perf_counter()
        plan = self.plan_documents(step, [self.sampler.lengths[index] for index in documents])
        plan_ms = (time.perf_counter() - start) * 1e3
        return PlannedStep(step, documents, plan, position, plan_ms, wait_ms=0.0)


def recorded_plans(record: Path) -> PlanDocuments:
    """Replays the plans that a run recorded: the same plans give the same bits on one hardware.

    Where a resumed run recorded a step again, the later plan counts.

    Raises:
        DataError: a file that cannot be read or is no recording; later, on a step that it lacks or
            whose documents had other lengths.
    """
    plans = _read_plans(record)

    def plan_documents(step: int, lengths: Sequence[int]) -> ScatterPlan:
        if step not in plans:
            raise DataError(f"{record} has no plan for step {step}: it holds {sorted(plans)[-1:]}")
        held = {i: g for m in plans[step].micro_batches for g in m.groups for i in g.sequences}
        if len(held) != len(lengths):
            raise DataError(
                f"step {step} of {record} plans {len(held)} documents, not {len(lengths)}"
            )
        for group in set(held.values()):
            tokens = sum(lengths[i] for i in group.sequences)
            if tokens != group.tokens:
                raise DataError(
                    f"step {step} of {record} plans documents of {group.tokens} tokens for ranks "
                    f"{group.ranks}, but these have {tokens}: it recorded other documents"
                )
        return plans[step]

    return plan_documents


def _read_plans(record: Path) -> dict[int, ScatterPlan]:
    try:
        lines = record.read_text().splitlines()
    except OSError as error:
        raise DataError(f"cannot read the recording {record}: {error.strerror}") from error
    plans = {}
    for number, line in enumerate(lines, start=1):
        try:
            planned = PlannedStep.from_json(line)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and len(lines) > 1:
                break  # a run that was killed while it wrote; the step was not begun
            raise DataError(f"{record}, line {number}, is no planned step: {error}") from error
        plans[planned.step] = planned.plan
    return plans
