"""Polishing a step's micro-batches: groups evened out, and other degrees tried where that is cheap.

Micro-batches are polished apart from each other, so workers may share them.
"""

from __future__ import annotations

from seqpar.planners.batch import SortedBatch
from seqpar.planners.clock import Clock
from seqpar.planners.degrees import search_degrees
from seqpar.planners.improve import improve
from seqpar.planners.packing import Packing
from seqpar.planners.workers import Workers, map_with

__all__ = ["polish_packings"]

USUAL_MICRO_BATCHES = 8
"""Up to so many, each is polished as far as the limit's work goes; more share that work."""

MOST_STEPS = 40
VECTOR_PLACEMENTS_PER_MS = 4

SHARED_SEQUENCES = 2000
"""Steps of fewer sequences are polished here: sending them to workers takes longer."""


def polish_packings(
    batch: SortedBatch,
    packings: list[Packing],
    *,
    time_limit_ms: float,
    clock: Clock,
    workers: Workers | None = None,
) -> list[Packing]:
    """Every micro-batch no worse than it was, as far as the limit's work and the clock go."""
    share = min(1.0, USUAL_MICRO_BATCHES / len(packings))
    tasks = [
        (*_alone(batch, packing), round(MOST_STEPS * share), share * time_limit_ms, clock)
        for packing in packings
    ]
    crew = workers if len(batch.tokens) >= SHARED_SEQUENCES else None
    polished = []
    for (members, *_), (packing, was_cut) in zip(
        tasks, map_with(crew, _polish, tasks), strict=True
    ):
        clock.has_struck |= was_cut
        polished.append([(d, [members[k] for k in group]) for d, group in packing])
    return polished


def _alone(batch: SortedBatch, packing: Packing) -> tuple[list[int], SortedBatch, Packing]:
    """The micro-batch's members, them as a batch of their own, and its packing there."""
    members = sorted(k for _, group in packing for k in group)
    place = {k: i for i, k in enumerate(members)}
    return (
        members,
        batch.subset(members),
        [(d, [place[k] for k in group]) for d, group in packing if group],
    )


def _polish(
    task: tuple[list[int], SortedBatch, Packing, int, float, Clock],
) -> tuple[Packing, bool]:
    """One micro-batch polished, and whether the clock ended that."""
    members, batch, packing, steps, limit_ms, clock = task
    if clock.is_over():
        return packing, True
    even = improve(batch, packing, max_steps=steps, clock=clock)
    vectors = int(limit_ms * VECTOR_PLACEMENTS_PER_MS / len(members))
    better = search_degrees(batch, range(len(members)), even, max_vectors=vectors, clock=clock)
    return better or even, clock.has_struck
