"""Ways to do the same step, timed in turns: clocks and temperature are alike for all of them."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from benchmarks.wrapped import FAILURES, Machine

__all__ = ["Step", "Timed", "Way", "in_turns"]

Step = Callable[[], Any]
"""Forward and backward; returns the loss."""
Way = Callable[[], AbstractContextManager[Step]]
"""What a turn enters before its clock starts."""


@dataclass
class Timed:
    """A way's times, or why there are none."""

    by_rank_ms: list[list[float]] = field(default_factory=list)
    """Of each round, every rank's."""
    loss: float = 0.0
    failure: str | None = None

    @property
    def series_ms(self) -> list[float]:
        """The slowest rank's."""
        return [max(ranks) for ranks in self.by_rank_ms]

    @property
    def ms(self) -> float:
        return round(statistics.median(self.series_ms), 2)

    @property
    def shared_ms(self) -> float:
        """What the ranks would take together for the work that each has done alone.

        Devices are not equally fast: half the slower one's time would be too much.
        """
        return statistics.median(1 / sum(1 / ms for ms in ranks) for ranks in self.by_rank_ms)


def in_turns(
    machine: Machine,
    model: nn.Module,
    ways: Mapping[str, Way],
    *,
    rounds: int,
    warm: int,
) -> Iterator[dict[str, Timed]]:
    """Each way's times after each round, the first of which is not counted.

    Ends early where the machine's time limit is over. `warm` says how often each way runs in the
    first round. A way that fails takes no further turn.
    """
    timed = {name: Timed() for name in ways}
    for turn in range(rounds + 1):
        if machine.left_out():
            return
        for name, way in ways.items():
            found = timed[name]
            for _ in range(1 if turn else warm):
                if found.failure is None:
                    _take(machine, model, way, found, counts=turn > 0)
        if turn:
            yield timed


def _take(machine: Machine, model: nn.Module, way: Way, found: Timed, *, counts: bool) -> None:
    try:
        model.zero_grad(set_to_none=True)
        with way() as step:
            machine.wait()
            started = time.perf_counter()
            loss = step()
            machine.finish()
            took = machine.every((time.perf_counter() - started) * 1e3)
        model.zero_grad(set_to_none=True)
    except FAILURES as error:
        traceback.print_exc()
        found.failure = f"{type(error).__name__}: {error}"[:300]
        return
    found.loss = float(loss)
    if counts:
        found.by_rank_ms.append([round(ms, 2) for ms in took])
