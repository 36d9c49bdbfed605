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
    """A way's times, the slowest rank's, or why there are none."""

    series_ms: list[float] = field(default_factory=list)
    loss: float = 0.0
    failure: str | None = None

    @property
    def ms(self) -> float:
        return round(statistics.median(self.series_ms), 2)


def in_turns(
    machine: Machine,
    model: nn.Module,
    ways: Mapping[str, Way],
    *,
    rounds: int,
    warm: Mapping[str, int],
) -> Iterator[dict[str, Timed]]:
    """Each way's times after each round, the first of which is not counted.

    Ends early where the machine's time limit is over. `warm` says how often a way runs in the first
    round, if not once. A way that fails takes no further turn.
    """
    timed = {name: Timed() for name in ways}
    for turn in range(rounds + 1):
        if machine.left_out():
            return
        for name, way in ways.items():
            found = timed[name]
            for _ in range(1 if turn else warm.get(name, 1)):
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
            machine.wait()
            took = machine.slowest((time.perf_counter() - started) * 1e3)
        model.zero_grad(set_to_none=True)
    except FAILURES as error:
        traceback.print_exc()
        found.failure = f"{type(error).__name__}: {error}"[:300]
        return
    found.loss = float(loss)
    if counts:
        found.series_ms.append(round(took, 2))
