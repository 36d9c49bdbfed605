"""Errors keep their message and their fields on the way from a rank's process."""

from __future__ import annotations

import pickle

import pytest

from seqpar.errors import (
    InfeasiblePlanError,
    LayoutError,
    MissingExtraError,
    RankFailedError,
    SeqparError,
    UnsupportedModelError,
)


@pytest.mark.parametrize(
    "error",
    [
        LayoutError("a"),
        UnsupportedModelError("layer", "why", "instead"),
        InfeasiblePlanError("a", needed_tokens=2, available_tokens=1),
        RankFailedError("a", global_rank=1, exit_code=3),
        MissingExtraError("ray", "ray", "launching"),
    ],
)
def test_errors_survive_pickling(error: SeqparError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
