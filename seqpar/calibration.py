"""Measures what a model costs on this machine, for the planner to plan with.

Every degree is measured with all ranks at work at once, as in training: on ranks that share cores
or links, a group alone would look faster than it will ever be. The constants are then fitted by
`seqpar.planners.calibrate`. It takes seconds, and is done at the start of a run.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqpar.batch import pack, shard
from seqpar.loss import token_loss_sum
from seqpar.planners import CostModel, Group, MicroBatch, ScatterPlan
from seqpar.planners.calibrate import GroupMeasurement, fit
from seqpar.training import PlanExecutor

__all__ = ["Calibration", "calibrate_model", "saved_bytes_per_token"]


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The fitted cost model, what it was fitted to, and how long measuring took."""

    cost: CostModel
    measurements: tuple[GroupMeasurement, ...]
    seconds: float

    def summary(self) -> str:
        """One line for people."""
        per_token = self.cost.memory_bytes_per_token / 1024
        return (
            f"calibrated in {self.seconds:.1f} s from {len(self.measurements)} measurements: "
            f"{self.cost.group_ms([4096], 1):,.0f} ms for 4,096 tokens alone, "
            f"{per_token:.0f} KiB a token, worst residual {self.cost.errors['worst_relative']:.0%}"
        )


def calibrate_model(
    executor: PlanExecutor,
    *,
    degrees: Sequence[int],
    vocab_size: int,
    strategy: str = "ring",
    longest_tokens: int = 4096,
    seed: int = 0,
) -> Calibration:
    """Time forward and backward by degree and length on all ranks, and fit the constants.

    Args:
        executor: the model and the ranks it will train on. Collective; gradients end up zeroed.
        degrees: sizes of groups to measure; each must divide the number of ranks.
        vocab_size: token ids are drawn below it.
        strategy: what the model's softmax layers run at degrees over 1.
        longest_tokens: the document whose time tells the quadratic part, at degree 1; at degree
            d it is sqrt(d) times as long, which costs a rank about the same.
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for degree in degrees:
        _group_ms(executor, degree, (64,) * degree, generator, vocab_size)  # connects, warms up
        for lengths in _shapes(degree, longest_tokens):
            tries = 2 if sum(lengths) <= 64 * degree else 1  # a short time is a noisy one
            ms = min(
                _group_ms(executor, degree, lengths, generator, vocab_size) for _ in range(tries)
            )
            rows.append(GroupMeasurement(degree=degree, lengths=lengths, ms=ms))
    bytes_per_token = saved_bytes_per_token(executor.model, executor.device, vocab_size)
    executor.model.zero_grad(set_to_none=True)
    cost = fit(rows, strategy=strategy, memory_bytes_per_token=bytes_per_token)
    return Calibration(cost=cost, measurements=tuple(rows), seconds=time.perf_counter() - start)


def saved_bytes_per_token(model: nn.Module, device: torch.device, vocab_size: int) -> float:
    """Bytes of activations that one token keeps for backward, parameters apart; on one device."""
    tokens = 2048
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = shard(pack([torch.arange(tokens) % vocab_size]), None, device=device)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss, _ = token_loss_sum(model(**batch.inputs), batch.labels)
        held = sum(kept.values())
    del loss
    return held / tokens


def _shapes(degree: int, longest_tokens: int) -> Iterator[tuple[int, ...]]:
    """Documents of one group: few tokens, many short documents, one long document."""
    yield (64,) * degree
    yield (512,) * (4 * degree)
    yield (math.isqrt(longest_tokens**2 * degree),)


def _every_rank_busy(num_ranks: int, degree: int, documents_a_group: int) -> ScatterPlan:
    groups = tuple(
        Group(
            ranks=tuple(range(index * degree, (index + 1) * degree)),
            degree=degree,
            strategy="local",
            sequences=tuple(range(index * documents_a_group, (index + 1) * documents_a_group)),
            predicted_ms=0.0,
            tokens=0,
        )
        for index in range(num_ranks // degree)
    )
    return ScatterPlan(micro_batches=(MicroBatch(makespan_ms=0.0, groups=groups),))


def _group_ms(
    executor: PlanExecutor,
    degree: int,
    lengths: Sequence[int],
    generator: torch.Generator,
    vocab_size: int,
) -> float:
    """The mean time of the groups: they all run documents of these lengths at the same time."""
    documents = [
        torch.randint(vocab_size, (tokens,), generator=generator)
        for _ in range(executor.num_ranks // degree)
        for tokens in lengths
    ]
    plan = _every_rank_busy(executor.num_ranks, degree, len(lengths))
    times = executor.forward_backward(plan, documents).group_ms[0]
    return sum(times) / len(times)
