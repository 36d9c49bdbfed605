"""One scattered mixer on one rank: what to compute, and what its forward steps leave.

Legend: B batch, T tokens on this rank, D documents.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from seqpar.ops.state_local import RankPart
from seqpar.ops.state_mixer import Inputs, Summary
from seqpar.ops.state_scan import Entries

__all__ = ["Forward", "Kept", "StateJob"]


@dataclass(frozen=True)
class StateJob:
    """One scattered mixer on one rank: what to compute, and how its states travel."""

    part: RankPart
    exchange: str
    return_final_state: bool
    takes_late: bool = False
    """A rank that takes from a gather may come to it late: no rank waits for it there."""

    @property
    def is_lean(self) -> bool:
        """Whether `state_lean` does, unless an initial state is given."""
        plain = self.exchange == "all_gather" and not self.return_final_state
        return plain and self.part.plan.is_simple


@dataclass(frozen=True)
class Kept:
    """What the backward steps want."""

    inputs: Inputs
    """The local inputs; by heads, this rank's heads of the whole stream."""
    summary: Summary | None
    entries: Entries
    """States that entered, by link."""


@dataclass(frozen=True)
class Forward:
    """What the forward steps leave: results, and what the backward steps want."""

    o: Tensor
    """[B, T, ...]."""
    final_states: Tensor | None
    """[B, D, *state_shape]."""
    kept: Kept
