"""Measured times feed back into planning: a cost model that is corrected as steps run."""

from __future__ import annotations

from collections.abc import Sequence

from seqpar.data import PlannedStep
from seqpar.planners import CostModel
from seqpar.planners.correction import corrected
from seqpar.training import StepResult

__all__ = ["CostFeedback"]

Observation = tuple[int, tuple[int, ...], float]
"""(degree, lengths of the group's documents in tokens, measured ms)."""

LATEST = 512
"""Groups remembered: enough to tell every constant, few enough to follow a machine that drifts."""


class CostFeedback:
    """The calibrated cost model, corrected by the latest groups that have run.

    Plans that were made before a step ended (they are made ahead) do not know it yet.

    Args:
        calibrated: the constants to start from.
        observations: those of an earlier part of the run, from a checkpoint.
    """

    def __init__(self, calibrated: CostModel, observations: Sequence[Observation] = ()) -> None:
        self.calibrated = calibrated
        self.observations = [(d, tuple(lengths), ms) for d, lengths, ms in observations][-LATEST:]
        self._corrected: CostModel | None = None

    @property
    def cost(self) -> CostModel:
        """The constants as corrected so far; worked out when asked for, not by the step."""
        if self._corrected is None:
            seen = list(self.observations)
            self._corrected = corrected(self.calibrated, seen) if seen else self.calibrated
        return self._corrected

    def observe(self, planned: PlannedStep, result: StepResult, lengths: Sequence[int]) -> None:
        """Learn from one step; `lengths` are those of all documents, by index."""
        for micro_batch, times in zip(planned.plan.micro_batches, result.group_ms, strict=True):
            for group, ms in zip(micro_batch.groups, times, strict=True):
                held = tuple(lengths[planned.documents[i]] for i in group.sequences)
                self.observations.append((group.degree, held, ms))
        del self.observations[:-LATEST]
        self._corrected = None
