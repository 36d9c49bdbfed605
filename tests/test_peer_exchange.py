"""Messages through inboxes: no circle of ranks waits, nobody for ever; on GPUs, what arrives."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from seqpar.peers.exchange import program, rounded_up
from seqpar.peers.exchange_limit import ExchangeLimit

ROOT = Path(__file__).parents[1]
Program = Callable[..., Iterator[tuple[str, int]]]
Pairs = set[tuple[int, int]]


def _finishes(size: int, exchanges: list[Pairs], order: Program, *, shared_queue: bool) -> bool:
    """Carry out all ranks' programs as their streams would: each in order, or all in one queue."""
    queues: dict[tuple[int, str], list[tuple[str, int]]] = {}
    for rank in range(size):
        for pairs in exchanges:
            send_to = [to for frm, to in sorted(pairs) if frm == rank]
            recv_from = [frm for frm, to in sorted(pairs) if to == rank]
            for action, peer in order(rank, size, send_to, recv_from):
                stream = "all" if shared_queue else "send" if action == "send" else "receive"
                queues.setdefault((rank, stream), []).append((action, peer))
    granted: Counter[tuple[int, int]] = Counter()  # of (sender, receiver)
    sent: Counter[tuple[int, int]] = Counter()
    inbox: dict[int, int] = {}  # whose message the receiver's inbox is granted to
    moved = True
    while moved:
        moved = False
        for (rank, _), queue in queues.items():
            while queue:
                action, peer = queue[0]
                if action == "grant":
                    assert rank not in inbox, "two ranks were let into one inbox"
                    inbox[rank], granted[peer, rank] = peer, granted[peer, rank] + 1
                elif action == "send":
                    if granted[rank, peer] <= sent[rank, peer]:
                        break
                    assert inbox[peer] == rank
                    sent[rank, peer] += 1
                elif sent[peer, rank] < granted[peer, rank]:
                    break
                else:
                    del inbox[rank]
                queue.pop(0)
                moved = True
    return not any(queues.values())


def _random_exchanges(size: int, count: int, seed: int) -> list[Pairs]:
    draws = random.Random(seed)
    pairs = [(a, b) for a in range(size) for b in range(size) if a != b]
    return [{p for p in pairs if draws.random() < draws.random()} for _ in range(count)]


@pytest.mark.parametrize("shared_queue", [False, True])
@pytest.mark.parametrize("size", range(2, 9))
def test_no_circle_of_ranks_waits(size: int, shared_queue: bool) -> None:
    everyone = {(a, b) for a in range(size) for b in range(size) if a != b}
    ring = [{(r, (r + t) % size) for r in range(size)} for t in range(1, size)]
    assert _finishes(size, [everyone, *ring, everyone], program, shared_queue=shared_queue)
    for seed in range(20):
        exchanges = _random_exchanges(size, 6, seed)
        assert _finishes(size, exchanges, program, shared_queue=shared_queue)


def test_other_orders_would_wait_for_ever() -> None:
    """Peers by their rank, and sends before grants in one queue: the test above can fail."""

    def by_rank(
        rank: int, size: int, send_to: list[int], recv_from: list[int]
    ) -> Iterator[tuple[str, int]]:
        yield from (("send", peer) for peer in send_to)
        for peer in recv_from:
            yield from (("grant", peer), ("deliver", peer))

    def sends_first(*given: object) -> Iterator[tuple[str, int]]:
        actions = list(program(*given))  # type: ignore[arg-type]
        yield from sorted(actions, key=lambda action: action[0] != "send")

    circle = [{(0, 1), (1, 0), (1, 2), (2, 1), (2, 0), (0, 2)}]
    assert not _finishes(3, circle, by_rank, shared_queue=True)
    assert not _finishes(2, [{(0, 1), (1, 0)}], sends_first, shared_queue=True)


@pytest.mark.parametrize("num_bytes", [1, 256, 257, 2**20, 2**20 + 1, 3 * 2**28, 2**29 + 512])
def test_inboxes_grow_in_few_steps(num_bytes: int) -> None:
    rounded = rounded_up(num_bytes)
    assert num_bytes <= rounded <= max(num_bytes + 255, num_bytes * 1.25)
    assert rounded_up(rounded) == rounded
    assert len({rounded_up(n) for n in range(2**20, 2**21, 4096)}) <= 9


def _limit(ended: threading.Event, seconds: float) -> ExchangeLimit:
    return ExchangeLimit([4, 6], 0, 2, timedelta(seconds=seconds), ended.set)


def _finish(limit: ExchangeLimit, stream: int, number: int) -> None:
    """What a stream writes, by the address it would write to."""
    ctypes.c_uint32.from_address(limit.address(stream)).value = number % 2**32


def test_a_rank_that_does_not_come_is_named_and_the_end_called(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ended = threading.Event()
    limit = _limit(ended, 0.2)
    began = time.monotonic()
    limit.posted(1, [1])
    _finish(limit, 0, 1)  # one of two streams: not done
    assert ended.wait(5)
    assert time.monotonic() - began >= 0.2
    assert "rank 4 has waited 0.2 s for rank(s) 6 in exchange 1" in caplog.text


def test_exchanges_that_finish_in_time_end_nothing() -> None:
    ended = threading.Event()
    limit = _limit(ended, 0.4)
    for number in range(1, 9):
        limit.posted(number, [1])
        time.sleep(0.1)
        _finish(limit, 0, number)
        _finish(limit, 1, number)
    assert not ended.wait(0.6)
    limit.close()
    limit.posted(9, [1])
    assert not ended.wait(0.6), "nobody looks any longer"


@pytest.mark.parametrize("last", [2**31 - 1, 2**32 - 1])
def test_numbers_of_exchanges_may_overflow_their_words(last: int) -> None:
    ended = threading.Event()
    limit = _limit(ended, 0.2)
    for stream in range(2):
        _finish(limit, stream, last)
    for number in (last, last + 1):
        limit.posted(number, [1])
        _finish(limit, 0, number)
        _finish(limit, 1, number)
    assert not ended.wait(0.6)
    limit.posted(last + 2, [1])
    _finish(limit, 0, last + 2)
    assert ended.wait(5), "one of two streams has not finished"


LATE = """
import os, time
from datetime import timedelta
from seqpar.peers.exchange_limit import ExchangeLimit
limits = [ExchangeLimit([4, 6], 0, 2, timedelta(seconds={limit_s})) for _ in range(8)]
if {sleep_s}:
    limits[0].posted(1, [1])
time.sleep({sleep_s})
"""


def _process(**numbers: float) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LATE.format(**numbers)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_the_process_ends_when_a_rank_does_not_come() -> None:
    done = _process(limit_s=0.2, sleep_s=60)
    assert done.returncode == -signal.SIGABRT
    assert "rank 4 has waited 0.2 s for rank(s) 6" in done.stderr


WAITING = """
import ctypes
from datetime import timedelta
from seqpar.peers.exchange_limit import ExchangeLimit
limit = ExchangeLimit([4, 6], 0, 2, timedelta(seconds=0.2))
limit.posted(1, [1])
print("waits", flush=True)
ctypes.{library}(None).sleep(3)
"""


def _seconds_waited(library: str) -> float:
    """Until the process is ended, while its main thread waits in a C function."""
    command = [sys.executable, "-c", WAITING.format(library=library)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waits\n"
        began = time.monotonic()
        process.wait(60)
    return time.monotonic() - began


def test_the_process_ends_while_a_launch_waits() -> None:
    """A launch waits while the device's queue is full, as it gets behind a rank that never comes.

    Called with the interpreter's lock held, it would keep everybody else from ending the process.
    """
    assert _seconds_waited("CDLL") < 2 < 2.5 < _seconds_waited("PyDLL")
    sources = (ROOT / "seqpar").rglob("*.py")
    assert not [path for path in sources if "ctypes.PyDLL" in path.read_text()]


def test_who_looks_does_not_disturb_the_end_of_the_process() -> None:
    for _ in range(3):  # looks every millisecond, while all is torn down
        done = _process(limit_s=0.004, sleep_s=0)
        assert done.returncode == 0, done.stderr


def _on_gpus(*arguments: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.exchange_on_gpus", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.multigpu
def test_copy_engines_deliver_what_nccl_delivers() -> None:
    assert "the ring over copy engines repeats the ring over NCCL bit by bit" in _on_gpus()


@pytest.mark.multigpu
def test_a_process_ends_whose_peer_does_not_come() -> None:
    said = _on_gpus("absent")
    assert "a process that waits for a rank that does not come ended after" in said
    assert "in exchange 1 by copy engines" in said
