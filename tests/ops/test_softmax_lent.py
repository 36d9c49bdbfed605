"""Gradients that the ring reads where they arrived: nothing of them is left in what it returns.

On GPUs `tests.exchange_on_gpus` has copy engines lend their inbox; here messages over gloo are lent
in the same way, and their memory is spoilt as soon as it has been given back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar import comm, messages
from seqpar.layout import SequenceLayout, Span
from tests.ops.softmax_cases import Case, assert_exact, layouts, run_case
from tests.ranks import run_ranks

NAN_BYTE = 0xFF


class _Loan:
    def __init__(self, messages: list[Tensor]) -> None:
        self.messages = messages

    def wait(self) -> None:
        """All are here."""

    def give_back(self) -> None:
        for message in self.messages:
            message.fill_(NAN_BYTE)


class _LendsByGloo:
    """In the place of copy engines: leaves messages to gloo, and lends what came by it."""

    def __init__(self) -> None:
        self.num_lent = 0

    def post(self, sends: Any, recvs: Any) -> tuple[Any, Any, Any]:
        return _Loan([]), sends, recvs

    def lend(self, sends: list[tuple[int, Tensor]], recvs: list[tuple[int, int]]) -> _Loan:
        landings = [(peer, torch.empty(size, dtype=torch.uint8)) for peer, size in recvs]
        messages = comm.exchange(sends, landings, dist.group.WORLD).wait()
        self.num_lent += len(messages)
        return _Loan(messages)


def _eight_tokens(index: int) -> Span:
    return Span(8 * index, 8 * (index + 1))


def _run(rank: int, cases: list[Case]) -> tuple[list[tuple[Tensor, ...]], int]:
    engines = _LendsByGloo()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(messages, "engines_of", lambda group: engines)
        return [run_case(rank, case) for case in cases], engines.num_lent


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_results_hold_nothing_that_was_lent(world_size: int, late: bool) -> None:
    cases = [Case(layout, value_dim=6) for layout in layouts((0, 3, 40, 41, 77), world_size)]
    # Other ranks see all keys of a rank, whose own gradients come in two parts: the sum of all must
    # not be made in what they send.
    ranks = range(world_size)
    shared = SequenceLayout(
        (0, 8 * world_size, 16 * world_size),
        tuple((_eight_tokens(rank), _eight_tokens(world_size + rank)) for rank in ranks),
    )
    cases += [Case(shared, causal=False), Case(shared, causal=False, dtype=torch.bfloat16)]
    cases = [replace(case, late=late) for case in cases]
    results = run_ranks(world_size, _run, cases)
    assert all(num_lent for _, num_lent in results)
    for i, case in enumerate(cases):
        assert_exact(case, [result[i] for result, _ in results])
