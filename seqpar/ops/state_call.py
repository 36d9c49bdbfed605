"""What one call of a scattered mixer is to do, or why it is refused: decided once for its shapes.

Legend: B batch, T tokens on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from seqpar.layout import SequenceLayout
from seqpar.ops.state_auto import choose_for
from seqpar.ops.state_exchange import EXCHANGES
from seqpar.ops.state_mixer import StateKind
from seqpar.ops.state_plan import RankPlan, rank_plan
from seqpar.planners.exchange import Link

__all__ = ["CallPlan", "call_plan", "misfit"]

MIN_OVERLAP_MS = 0.2
"""Adding states afterwards takes launches of its own, and what computes beside an exchange is held
back by it: a layer of 65,536 tokens lost 0.14 ms so on two H200s. Not worth it for less."""


@dataclass(frozen=True)
class CallPlan:
    """How to answer a call; the same object for every call that is alike."""

    problem: str | None
    """What does not fit, in words; None if all does."""
    exchange: str = ""
    rank_plan: RankPlan | None = None


@lru_cache(maxsize=512)
def call_plan(
    kind: StateKind,
    layout: SequenceLayout,
    group: tuple[int, int],
    inputs: tuple[tuple[torch.Size, torch.dtype], ...],
    device: torch.device,
    initial_shape: torch.Size | None,
    exchange: str,
    overlap: bool | None,
    link: Link,
    shared_bytes: int = 0,
) -> CallPlan:
    """The plan of a call.

    Args:
        group: its size, and this rank in it.
        inputs: shape and dtype of this rank's tensors [B, T, ...].
        initial_shape: of the initial state, if there is one.
        exchange, overlap: as the caller gave them; "auto" and None are decided here.
        link: what joins the ranks.
        shared_bytes: the largest message that an all_gather moves over memory that peers read.
    """
    problem = _problem(kind, layout, group, [shape for shape, _ in inputs], initial_shape, exchange)
    if problem is not None:
        return CallPlan(problem)
    choice = choose_for(kind, layout, inputs, link)
    exchange = choice.exchange if exchange == "auto" else exchange
    if overlap is None:
        overlap = choice.estimates_ms[exchange] >= MIN_OVERLAP_MS
    (shape, dtype), rank = inputs[0], group[1]
    arguments = (kind, layout, rank, shape[0], dtype, device, overlap)
    plan = rank_plan(*arguments)
    if exchange == "all_gather" and 0 < _message_bytes(plan) <= shared_bytes:
        plan = rank_plan(*arguments, whole=True)
    return CallPlan(None, exchange, plan)


def _message_bytes(plan: RankPlan) -> int:
    """Of the larger all_gather, forward or backward."""
    scans = (plan.forward_scan, plan.backward_scan)
    return max(x.chain.most_givers * x.numel * x.dtype.itemsize for x in scans)


def _problem(
    kind: StateKind,
    layout: SequenceLayout,
    group: tuple[int, int],
    shapes: list[torch.Size],
    initial_shape: torch.Size | None,
    exchange: str,
) -> str | None:
    size, rank = group
    if layout.world_size != size:
        return (
            f"the layout is over {layout.world_size} ranks, but the group has {size}: "
            "make the layout for the group it is used with"
        )
    if exchange not in ("auto", "all_to_all", *EXCHANGES):
        return f"no exchange {exchange!r}: use auto, all_to_all, {', '.join(EXCHANGES)}"
    if exchange == "all_to_all" and not kind.heads_apart:
        return "this mixer does not compute heads apart: use an exchange of states"
    if (problem := misfit(shapes, layout.tokens_on(rank), rank)) is not None:
        return problem
    for head, g in enumerate(kind.host_log_decay or ()):
        if not g <= 0:
            return (
                f"log_decay of head {head} is {g:g}, but a decay is at most 1, its logarithm at "
                "most 0: pass natural logarithms of decays"
            )
    states = (kind.state_shape, (shapes[0][0], *kind.state_shape))
    if initial_shape is not None and tuple(initial_shape) not in states:
        return (
            f"initial_state has shape {tuple(initial_shape)}; it must be {states[0]}, "
            f"or that for each of {shapes[0][0]} rows"
        )
    return None


def misfit(shapes: list[torch.Size], tokens: int, rank: int) -> str | None:
    """What is wrong with the shapes of a rank's inputs, which shall be [B, tokens, ...]."""
    for index, shape in enumerate(shapes):
        has = f"input {index} on rank {rank} has shape {tuple(shape)}, but"
        if len(shape) < 3:
            return f"{has} it must be [B, T, ...], of three dims or more"
        if shape[1] != tokens:
            return (
                f"{has} the layout gives this rank {tokens} tokens on dim 1 of [B, T, ...]: shard "
                "it with this layout"
            )
        if shape[0] != shapes[0][0]:
            return f"{has} input 0 has {shapes[0][0]} rows: expand it to as many"
    return None
