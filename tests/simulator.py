"""W virtual ranks in one process: answers the requests of every rank's steps without a group."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.ops.steps import AllGather, AllReduceSum, AllToAll, Beside, Steps, Swap, Together


def simulate(ranks: Sequence[Steps[Any]]) -> list[Any]:
    """Run the steps of all ranks to their ends; their results in rank order.

    Nothing is buffered: a rank stands still until every message of its request has met its peer,
    sends among them, so an order that could lock ranks on a real backend is found and refused.
    """
    world = _World(ranks)
    while not world.finished:
        assert world.advance(), f"the ranks wait for each other: {world.waiting}"
    return world.results


class _World:
    def __init__(self, ranks: Sequence[Steps[Any]]) -> None:
        self._stacks: list[list[tuple[Steps[Any], Callable[[Any], Any]]]] = [
            [(steps, lambda value: value)] for steps in ranks
        ]
        self.results: list[Any] = [None] * len(ranks)
        self.waiting: dict[int, Any] = {}
        self._open = [0] * len(ranks)  # messages of a rank's request that have not met yet
        self._sends: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        self._recvs: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        for rank in range(len(ranks)):
            self._resume(rank, None)

    @property
    def finished(self) -> bool:
        return not self.waiting

    def advance(self) -> bool:
        """Answer whatever can be answered; whether anything was."""
        for pair, sends in self._sends.items():
            while sends and self._recvs[pair]:
                message, landing = sends.popleft(), self._recvs[pair].popleft()
                assert message.shape == landing.shape
                assert message.dtype == landing.dtype
                landing.copy_(message)
                for rank in pair:
                    self._open[rank] -= 1
        progress = False
        for rank, request in list(self.waiting.items()):
            if isinstance(request, Swap) and not self._open[rank]:
                self._resume(rank, None)
                progress = True
        return self._collective() or progress

    def _collective(self) -> bool:
        requests = [self.waiting.get(rank) for rank in range(len(self.results))]
        kinds = {type(request) for request in requests}
        if len(kinds) != 1 or kinds & {Swap, type(None)}:
            return False
        for rank, delivered in enumerate(_answers(requests)):
            self._resume(rank, delivered)
        return True

    def _resume(self, rank: int, delivered: Any) -> None:
        self.waiting.pop(rank, None)
        steps, finish = self._stacks[rank][-1]
        try:
            request = steps.send(delivered)
        except StopIteration as stop:
            self._stacks[rank].pop()
            if not self._stacks[rank]:
                self.results[rank] = stop.value
            else:
                self._resume(rank, finish(stop.value))
            return
        if isinstance(request, Beside):
            done = request.work()
            self._stacks[rank].append((request.exchange, lambda value: (value, done)))
            self._resume(rank, None)
        elif isinstance(request, Together):
            self._stacks[rank].append((_in_turn(request), lambda value: value))
            self._resume(rank, None)
        else:
            if isinstance(request, Swap):
                self._post(rank, request)
            self.waiting[rank] = request

    def _post(self, rank: int, request: Swap) -> None:
        for peer, tensor in request.sends:
            self._sends[rank, peer].append(tensor)
        for peer, tensor in request.recvs:
            self._recvs[peer, rank].append(tensor)
        self._open[rank] = len(request.sends) + len(request.recvs)


def _in_turn(request: Together) -> Steps[list[Any]]:
    delivered = []
    for item in request.requests:
        delivered.append((yield item))
    return delivered


def _answers(requests: list[Any]) -> list[Any]:
    match requests[0]:
        case AllGather(message):
            assert len({request.message.shape for request in requests}) == 1
            return [_gathered(requests, request) for request in requests]
        case AllReduceSum(message):
            assert all(request.message.shape == message.shape for request in requests)
            return [torch.stack([request.message for request in requests]).sum(0)] * len(requests)
        case AllToAll():
            answers = []
            for rank, request in enumerate(requests):
                parts = [sender.sends[rank] for sender in requests]
                assert [p.shape for p in parts] == [torch.Size(s) for s in request.recv_shapes]
                answers.append(parts)
            return answers
    raise AssertionError(f"unknown request {requests[0]}")


def _gathered(requests: list[AllGather], wanting: AllGather) -> Tensor:
    """What one rank gets; of ranks that are none of its sources, nothing that could be used."""
    gathered = torch.stack([request.message for request in requests])
    for rank, request in enumerate(requests):
        if wanting.sources is None or rank in wanting.sources:
            assert request.gives, f"rank {rank} gives nothing"
        else:
            gathered[rank] = float("nan")
    return gathered
