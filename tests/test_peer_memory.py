"""Memory that peers read is set up on all ranks or on none, and waits for it are limited.

What needs GPUs is in tests/ops/state_on_gpus.py and tests/ops/late_rank_on_gpus.py.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from seqpar.peers.memory import ApartError, _check_places, open_on_one_host, together
from seqpar.peers.memory_limit import WaitLimit
from tests.ranks import run_ranks


def _step(rank: int, fails: int) -> int:
    if rank == fails:
        raise OSError(f"no memory on {rank}")
    return rank


def _apart(rank: int) -> str:
    group = dist.group.WORLD
    assert group is not None
    assert together(group, lambda: _step(rank, -1)) == rank
    with pytest.raises(ApartError) as caught:
        together(group, lambda: _step(rank, 1))
    assert open_on_one_host(lambda *_: rank, group, 64) is None, "there is no device"
    return str(caught.value)


def test_a_step_that_fails_on_one_rank_fails_on_all() -> None:
    assert run_ranks(3, _apart) == ["rank 1: OSError: no memory on 1"] * 3


@pytest.mark.parametrize(
    ("places", "reason"),
    [
        ([("a", "c", 0), ("b", "c", 1)], "several hosts"),
        ([("a", "c", 0), ("a", "d", 1)], "several containers"),
        ([("a", "c", 0), ("a", "c", 0)], "under one numbering"),
    ],
)
def test_ranks_that_are_apart_use_nccl(places: list[tuple[str, str, int]], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        _check_places(places, 0)


def _report(limit: WaitLimit, missing: int, call: int) -> None:
    """What a kernel writes."""
    page: Any = limit._page
    page[1], page[0] = call, missing + 1


def test_who_was_waited_for_is_said(caplog: pytest.LogCaptureFixture) -> None:
    limit = WaitLimit([4, 5, 7], 1)
    limit.enforce(timedelta(seconds=90))
    assert limit._page.tolist() == [0, 0, 90_000_000_000, 1]
    assert limit.problem() is None
    _report(limit, 2, 17)
    end = time.monotonic() + 10
    with caplog.at_level(logging.ERROR):
        while not caplog.records and time.monotonic() < end:
            time.sleep(0.05)
    assert "rank 5 has waited 90 s for rank 7 in all_gather 17" in caplog.text
    limit.close()


def test_a_limit_of_for_ever_is_not_over_at_once() -> None:
    limit = WaitLimit([0, 1], 0)
    limit.tolerate(timedelta.max)
    assert limit._page.tolist() == [0, 0, 2**63 - 1, 0]


def test_a_trial_is_not_the_end() -> None:
    limit = WaitLimit([0, 1], 0)
    limit.tolerate(timedelta(seconds=30))
    assert limit._page.tolist() == [0, 0, 30_000_000_000, 0]
    _report(limit, 1, 1)
    assert "for rank 1" in str(limit.problem())
