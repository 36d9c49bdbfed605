"""W virtual ranks in one process: answers the requests of every rank's steps without a group."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.ops.steps import AllGather, AllReduceSum, AllToAll, Beside, Steps, Swap


def simulate(ranks: Sequence[Steps[Any]]) -> list[Any]:
    """Run the steps of all ranks to their ends; their results in rank order.

    Ranks run in turn, each as far as it can: a rank that waits for a message stands still until
    the message was sent, so a cycle of waits is found and refused.
    """
    world = _World(ranks)
    while not world.finished:
        assert world.advance(), f"the ranks wait for each other: {world.waiting}"
    return world.results


class _World:
    def __init__(self, ranks: Sequence[Steps[Any]]) -> None:
        self._stacks: list[list[tuple[Steps[Any], Any]]] = [[(steps, None)] for steps in ranks]
        self.results: list[Any] = [None] * len(ranks)
        self.waiting: dict[int, Any] = {}
        self._mail: dict[tuple[int, int], deque[Tensor]] = defaultdict(deque)
        for rank in range(len(ranks)):
            self._resume(rank, None)

    @property
    def finished(self) -> bool:
        return not self.waiting

    def advance(self) -> bool:
        """Answer whatever can be answered; whether anything was."""
        progress = False
        for rank, request in list(self.waiting.items()):
            if isinstance(request, Swap) and self._has_mail(rank, request):
                for peer, tensor in request.recvs:
                    message = self._mail[peer, rank].popleft()
                    assert message.shape == tensor.shape
                    assert message.dtype == tensor.dtype
                    tensor.copy_(message)
                self._resume(rank, None)
                progress = True
        return self._collective() or progress

    def _has_mail(self, rank: int, request: Swap) -> bool:
        wanted: dict[int, int] = defaultdict(int)
        for peer, _ in request.recvs:
            wanted[peer] += 1
        return all(len(self._mail[peer, rank]) >= count for peer, count in wanted.items())

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
        steps, work = self._stacks[rank][-1]
        try:
            request = steps.send(delivered)
        except StopIteration as stop:
            self._stacks[rank].pop()
            if not self._stacks[rank]:
                self.results[rank] = stop.value
            else:
                self._resume(rank, (stop.value, work))
            return
        if isinstance(request, Beside):
            self._stacks[rank].append((request.exchange, request.work()))
            self._resume(rank, None)
            return
        if isinstance(request, Swap):
            for peer, tensor in request.sends:
                self._mail[rank, peer].append(tensor)
        self.waiting[rank] = request


def _answers(requests: list[Any]) -> list[Any]:
    match requests[0]:
        case AllGather(message):
            assert len({request.message.shape for request in requests}) == 1
            gathered = torch.stack([request.message for request in requests])
            return [gathered] * len(requests)
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
