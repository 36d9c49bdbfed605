"""Who watches shared memory is gone when its owner is, and before the interpreter ends."""

from __future__ import annotations

import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch

from seqpar.peers.exchange_limit import ExchangeLimit
from seqpar.peers.memory_limit import WaitLimit
from seqpar.peers.watching import watch


def _exchange_limit() -> ExchangeLimit:
    return ExchangeLimit([0, 1], 0, 2, timedelta(seconds=60))


def _wait_limit() -> WaitLimit:
    limit = WaitLimit([0, 1], 0)
    limit.enforce(timedelta(seconds=60))
    return limit


def _watchers() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name in ("exchange limit", "peer limit")}


@pytest.mark.parametrize("closes", [False, True])
@pytest.mark.parametrize("make", [_exchange_limit, _wait_limit])
def test_pages_are_freed_by_whoever_drops_the_limit(
    make: Callable[[], ExchangeLimit | WaitLimit], closes: bool
) -> None:
    """A watcher that freed a tensor while the interpreter ends would abort the process."""
    before, freed_by = _watchers(), list[int]()
    limit = make()
    weakref.finalize(limit._page, lambda: freed_by.append(threading.get_ident()))
    assert len(_watchers() - before) == 1
    if closes:
        limit.close()
        assert _watchers() <= before
        assert not freed_by, "kernels may still write to it"
    del limit
    assert _watchers() <= before
    assert freed_by == [threading.get_ident()]


LIMITS = """
import sys
from datetime import timedelta
from seqpar.peers.exchange_limit import ExchangeLimit
from seqpar.peers.memory_limit import WaitLimit
limits = [ExchangeLimit([0, 1], 0, 2, timedelta(seconds=60)) for _ in range(100)]
limits += [WaitLimit([0, 1], 0) for _ in range(100)]
for limit in limits[100:]:
    limit.enforce(timedelta(seconds=60))
"""


@pytest.mark.parametrize(
    ("ending", "returncode"),
    [
        ("limits.clear()", 0),
        ("for limit in limits: limit.close()", 0),
        ("limits.append(limits); del limits, limit", 0),
        ("pass", 0),
        ("sys.exit(3)", 3),
        ("raise ValueError", 1),
        ("import os; os._exit(4)", 4),
    ],
    ids=["dropped", "closed", "in a circle", "kept", "sys.exit", "exception", "os._exit"],
)
def test_a_process_ends_as_it_says(ending: str, returncode: int) -> None:
    command = [sys.executable, "-c", LIMITS + ending]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == returncode, done.stderr[-2000:]
    assert "terminate" not in done.stderr


def test_a_watcher_may_be_what_lets_go_of_its_owner() -> None:
    """As by a collection on its thread: it cannot wait for itself."""

    class Owner:
        pass

    owners, dropped = [Owner()], threading.Event()

    def look() -> bool:
        owners.clear()
        dropped.set()
        return True

    watch(owners[0], look, torch.zeros(4), every_s=0.01, name="lets go")
    assert dropped.wait(10)
    for thread in threading.enumerate():
        if thread.name == "lets go":
            thread.join(10)
            assert not thread.is_alive()
