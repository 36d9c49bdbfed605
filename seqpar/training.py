"""Executes plans: forward and backward of every micro-batch, gradients averaged by tokens.

In each micro-batch a rank works in at most one group; groups work at the same time on different
documents. The loss of every token is divided by the number of targets of the whole step before
backward, so that the sum of all ranks' gradients is the gradient of the mean over all targets,
whatever the split.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.batch import Batch, pack, shard
from seqpar.loss import token_loss_sum
from seqpar.mesh import GroupPool
from seqpar.ops.softmax_choice import Strategy
from seqpar.planners import Group, ScatterPlan
from seqpar.wrap import takes_strategy

__all__ = ["Parity", "PlanExecutor", "StepResult"]


@dataclass(frozen=True)
class StepResult:
    """What one step measured; the same on every rank.

    `group_spans_ms[m][g]` is (start, stop) of group g in micro-batch m, since the step's start:
    the earliest start and the latest stop among its ranks.
    """

    loss: float
    num_tokens: int
    num_targets: int
    step_ms: float
    group_spans_ms: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def group_ms(self) -> tuple[tuple[float, ...], ...]:
        """Measured time of each group, by micro-batch."""
        return tuple(tuple(stop - start for start, stop in spans) for spans in self.group_spans_ms)


@dataclass(frozen=True)
class Parity:
    """How far a planned step on all ranks is from the same documents on one process."""

    loss_relative_error: float
    gradient_relative_error: float
    worst_parameter: str

    @property
    def relative_error(self) -> float:
        return max(self.loss_relative_error, self.gradient_relative_error)


class PlanExecutor:
    """Runs planned steps of a model whose forward is `model(**batch.inputs)`.

    That is a seqpar model, or one that `parallelize` has wrapped; it returns logits, or something
    that has them. Softmax layers exchange as the plan says for each group, if the model takes a
    `strategy` with its call (seqpar's own and wrapped Hugging Face models do); a model of another
    kind runs its own.

    Args:
        model: identical parameters on every rank.
        pool: process groups by ranks; the plan's groups are prepared before it runs.
        world: all ranks of the job; None for a job of one rank.
        device: where the model and the tokens live.
        layout: how a group's stream is laid over its ranks: "balanced" cuts no more documents than
            equal work asks for, "zigzag" and "contiguous" cut the stream.
        autocast: forward runs under torch.autocast to this dtype; None leaves it as it is.
        on_group: told (micro-batch, group) before this rank begins each group, to report progress.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: GroupPool,
        *,
        world: ProcessGroup | None,
        device: torch.device,
        layout: Literal["balanced", "contiguous", "zigzag"] = "balanced",
        autocast: torch.dtype | None = None,
        on_group: Callable[[int, Group], None] | None = None,
    ) -> None:
        self.model = model
        self.pool = pool
        self.world = world
        self.device = device
        self.layout: Literal["balanced", "contiguous", "zigzag"] = layout
        self.autocast = autocast
        self.on_group = on_group
        self.rank = comm.group_rank(world)
        self.num_ranks = comm.group_size(world)
        self._takes_strategy = takes_strategy(model)

    def forward_backward(self, plan: ScatterPlan, documents: Sequence[Tensor]) -> StepResult:
        """Leave the gradient of the step's mean loss in every parameter, on every rank.

        Args:
            plan: which sequence (index into `documents`) goes to which ranks.
            documents: 1-D int64 tensors of token ids, the same on every rank.
        """
        self.pool.prepare([g.ranks for m in plan.micro_batches for g in m.groups])
        num_targets = sum(len(document) - 1 for document in documents)
        start = self._now()
        loss_sum = torch.zeros((), dtype=torch.float64)
        times = torch.full((len(plan.micro_batches), 2), torch.nan, dtype=torch.float64)
        for index, micro_batch in enumerate(plan.micro_batches):
            for group in micro_batch.groups:
                if self.rank in group.ranks:
                    if self.on_group is not None:
                        self.on_group(index, group)
                    times[index, 0] = self._now() - start
                    parts = [documents[sequence] for sequence in group.sequences]
                    ranks = self.pool.group(group.ranks)
                    loss_sum += self._backward(parts, ranks, num_targets, _softmax_strategy(group))
                    times[index, 1] = self._now() - start
        self._sum_gradients()
        loss_sum = comm.all_reduce_sum(loss_sum.to(self.device), group=self.world).cpu()
        step_ms = (self._now() - start) * 1e3
        gathered = comm.all_gather(times.to(self.device), self.world).cpu() * 1e3
        return StepResult(
            loss=loss_sum.item() / max(num_targets, 1),
            num_tokens=sum(len(document) for document in documents),
            num_targets=num_targets,
            step_ms=step_ms,
            group_spans_ms=tuple(
                tuple(_span_of(gathered[list(group.ranks), index]) for group in micro_batch.groups)
                for index, micro_batch in enumerate(plan.micro_batches)
            ),
        )

    def mean_loss(self, documents: Sequence[Tensor]) -> float:
        """Mean loss of held-out documents in nats a token, each document on one rank."""
        totals = torch.zeros(2, dtype=torch.float64)
        for index in _share_of(self.rank, self.num_ranks, documents):
            with torch.no_grad():
                loss, count = self._loss_sum(self._shard([documents[index]], None))
            totals += torch.tensor([float(loss), float(count)], dtype=torch.float64)
        totals = comm.all_reduce_sum(totals.to(self.device), group=self.world).cpu()
        return (totals[0] / totals[1]).item()

    def loss_alone(self, documents: Sequence[Tensor]) -> Tensor:
        """Summed loss of these documents on this rank alone, differentiable; no collective."""
        return self._loss_sum(self._shard(documents, None))[0]

    def check_parity(self, plan: ScatterPlan, documents: Sequence[Tensor]) -> Parity:
        """Compare one planned step, loss and every gradient, with one process doing it alone.

        Rank 0 runs every document by itself with no group while the others wait. Leaves the
        gradients zeroed.
        """
        self.model.zero_grad(set_to_none=True)
        planned = self.forward_backward(plan, documents)
        gradients = {name: _gradient(p).clone() for name, p in self.model.named_parameters()}
        parity = self._compare_alone(planned, gradients, documents) if self.rank == 0 else None
        self.model.zero_grad(set_to_none=True)
        found: Parity | None = comm.broadcast_object(parity, group=self.world, source=0)
        assert found is not None
        return found

    def _backward(
        self,
        documents: Sequence[Tensor],
        group: ProcessGroup | None,
        num_targets: int,
        strategy: Strategy | None = None,
    ) -> Tensor:
        """Backward of this rank's share of one group's stream; its summed loss, float64."""
        loss, _ = self._loss_sum(self._shard(documents, group), strategy)
        (loss / max(num_targets, 1)).backward()  # type: ignore[no-untyped-call]
        return loss.detach().double().cpu()

    def _shard(self, documents: Sequence[Tensor], group: ProcessGroup | None) -> Batch:
        return shard(pack(documents), group, layout=self.layout, device=self.device)

    def _loss_sum(self, batch: Batch, strategy: Strategy | None = None) -> tuple[Tensor, Tensor]:
        """Summed loss of the batch's targets on this rank, and their number."""
        inputs = batch.inputs
        if strategy is not None and self._takes_strategy:
            inputs["strategy"] = strategy
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            output = self.model(**inputs)
            return token_loss_sum(getattr(output, "logits", output), batch.labels)

    def _sum_gradients(self) -> None:
        """One all-reduce of every gradient, flattened; ranks that had no work add zeros."""
        gradients = [_gradient(parameter) for parameter in self.model.parameters()]
        total = comm.all_reduce_sum(
            torch.cat([gradient.flatten() for gradient in gradients]), group=self.world
        )
        offset = 0
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            part = total[offset : offset + gradient.numel()]
            parameter.grad = part.view_as(gradient).clone()
            offset += gradient.numel()

    def _compare_alone(
        self, planned: StepResult, gradients: dict[str, Tensor], documents: Sequence[Tensor]
    ) -> Parity:
        self.model.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), dtype=torch.float64)
        for document in documents:
            loss_sum += self._backward([document], None, planned.num_targets)
        errors = {
            name: _relative_error(gradients[name], _gradient(parameter))
            for name, parameter in self.model.named_parameters()
        }
        worst = max(errors, key=lambda name: errors[name])
        loss = loss_sum.item() / max(planned.num_targets, 1)
        return Parity(abs(planned.loss - loss) / abs(loss), errors[worst], worst)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _softmax_strategy(group: Group) -> Strategy | None:
    """The plan's word for a group's softmax layers; None if it says none ("local", "state")."""
    return cast(Strategy, group.strategy) if group.strategy in get_args(Strategy) else None


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _relative_error(out: Tensor, ref: Tensor) -> float:
    difference = float((out - ref).double().norm())
    size = float(ref.double().norm())
    if difference != difference:
        return float("inf")
    return difference / size if size else difference


def _span_of(times: Tensor) -> tuple[float, float]:
    return times[:, 0].min().item(), times[:, 1].max().item()


def _share_of(rank: int, world_size: int, documents: Sequence[Tensor]) -> list[int]:
    """Indices of the documents that the rank evaluates: longest first to the least loaded."""
    loads = [0] * world_size
    share = []
    for index in sorted(range(len(documents)), key=lambda i: (-len(documents[i]), i)):
        lightest = loads.index(min(loads))
        loads[lightest] += len(documents[index])
        if lightest == rank:
            share.append(index)
    return share
