"""The order of messages through inboxes: no circle of ranks waits; on GPUs, what arrives."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from seqpar.peer_exchange import program

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


@pytest.mark.multigpu
def test_copy_engines_deliver_what_nccl_delivers() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, "-m", "tests.exchange_on_gpus"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert "the ring over copy engines repeats the ring over NCCL bit by bit" in done.stdout
