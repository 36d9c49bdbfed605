"""Measured times move the constants towards what was measured, and no further."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from seqpar.errors import PlanError
from seqpar.planners import CostModel
from seqpar.planners.correction import corrected, prediction_error
from tests.planners.test_plan import SMALL

WRONG = replace(
    SMALL,
    fixed_ms=8.0,
    layers=(replace(SMALL.layers[0], linear_ms=0.13, quadratic_ms=0.7e-6),),
    links=tuple(replace(link, gib_per_s=link.gib_per_s * 1.5) for link in SMALL.links),
)


def observed(truth: CostModel, count: int) -> list[tuple[int, list[int], float]]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(count):
        degree = (1, 2, 4)[i % 3]
        lengths = rng.integers(10, 20_000, int(rng.integers(1, 5))).tolist()
        rows.append((degree, lengths, truth.group_ms(lengths, degree)))
    return rows


def test_many_observations_recover_the_truth() -> None:
    fixed = corrected(WRONG, observed(SMALL, 300))
    fresh = observed(SMALL, 50)
    assert prediction_error(WRONG, fresh) > 0.1
    assert prediction_error(fixed, fresh) < 0.01
    assert fixed.errors["observed_relative_before"] > 10 * fixed.errors["observed_relative_after"]
    assert fixed.errors["observations"] == 300


def test_one_observation_moves_a_little_and_in_the_right_direction() -> None:
    row = (1, [5000], SMALL.group_ms([5000], 1) * 2)
    fixed = corrected(SMALL, [row])
    assert SMALL.group_ms([5000], 1) < fixed.group_ms([5000], 1) < row[2]
    assert fixed.links == SMALL.links


def test_right_predictions_change_nothing() -> None:
    fixed = corrected(SMALL, observed(SMALL, 12))
    assert fixed.group_ms([4321], 4) == pytest.approx(SMALL.group_ms([4321], 4), rel=1e-9)


@pytest.mark.parametrize("rows", [[], [(1, [5], 0.0)], [(1, [], 2.0)]])
def test_useless_observations_are_refused(rows: list[tuple[int, list[int], float]]) -> None:
    with pytest.raises(PlanError, match="observation"):
        corrected(SMALL, rows)


@pytest.mark.parametrize("times", [5.0, 0.2])
def test_one_time_that_is_far_off_does_not_spoil_the_rest(times: float) -> None:
    rows = observed(SMALL, 12)
    degree, lengths, ms = rows[4]
    rows[4] = (degree, lengths, times * ms)
    fixed = corrected(WRONG, rows)
    fresh = observed(SMALL, 50)
    assert prediction_error(fixed, fresh) < 0.3 * prediction_error(WRONG, fresh)
