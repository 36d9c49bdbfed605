"""Ranks of this machine for a command: their results, and how they fail."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqpar import ranks
from seqpar.errors import LaunchError, LayoutError, MeshError
from seqpar.ranks import run_on_ranks


def _waits_for_a_failed_one(rank: int) -> None:
    """As a rank on NCCL does: it is not told that the other has gone."""
    if rank == 1:
        raise LayoutError("its own words")
    time.sleep(200)


def _sum(rank: int, addend: int) -> int:
    total = torch.tensor(rank + addend)
    dist.all_reduce(total)
    return int(total)


def _fails_on_one(rank: int, error: Exception) -> Any:
    if rank == 1:
        raise error
    return _sum(rank, 0)


def test_results_come_in_rank_order() -> None:
    assert run_on_ranks(_sum, 4, ranks=3, device="cpu", timeout_s=60.0) == [15, 15, 15]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(LayoutError("its own words"), LayoutError), (ValueError("its own words"), LaunchError)],
    ids=["SeqparError", "other"],
)
def test_what_the_failing_rank_says_is_raised(error: Exception, raised: type[Exception]) -> None:
    with pytest.raises(raised, match="its own words"):
        run_on_ranks(_fails_on_one, error, ranks=2, device="cpu", timeout_s=60.0)


def test_ranks_left_by_a_failed_one_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "GRACE_S", 0.5)
    started = time.monotonic()
    with pytest.raises(LayoutError, match="its own words"):
        run_on_ranks(_waits_for_a_failed_one, ranks=2, device="cpu", timeout_s=150.0)
    assert time.monotonic() - started < 100.0


def test_no_ranks_are_refused() -> None:
    with pytest.raises(MeshError, match="at least 1 rank"):
        run_on_ranks(_sum, 0, ranks=0, device="cpu", timeout_s=1.0)
