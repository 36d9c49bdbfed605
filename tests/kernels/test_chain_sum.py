"""The states that enter links, in one launch, against Horner's rule in float64."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from seqpar.kernels.chain_sum import ChainTable, chain_sums
from tests.tolerances import assert_close

B, H, K, V = 2, 3, 4, 500
SHAPE = (B, H, K, V)
NUMEL = B * H * K * V
SLOTS, TOKENS = [2, 0, 3, 1, -1], [7, 5, 11, 2, 9]
BOUNDS = [(0, 1), (0, 4), (2, 4)]
"""A link with one source, one with four, and one whose document begins at the third."""


def _device() -> str:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1 before it is imported")
    return "cpu"


def _expected(states: Tensor, logs: Tensor) -> Tensor:
    """states [rows, *SHAPE], logs [links, *SHAPE], both float64."""
    entries = []
    for first, link in BOUNDS:
        entry = torch.zeros(SHAPE, dtype=torch.float64, device=states.device)
        for index in range(first, link):
            entry = states[SLOTS[index]] + logs[index].exp() * entry
        entries.append(entry)
    return torch.stack(entries)


@pytest.mark.parametrize("dims", [0, 1, 2], ids=["no decay", "scalar", "vector"])
@pytest.mark.parametrize("carries", [False, True], ids=["known", "carried"])
def test_entries_are_sums_over_the_links_before(carries: bool, dims: int) -> None:
    device = _device()
    if carries and not dims:
        pytest.skip("what is no decay does not travel")
    states = torch.randn(4, *SHAPE, device=device)
    rates = -torch.rand(SHAPE[1 : 1 + dims], device=device) * 0.3 if dims else None
    messages, log_decay = states.flatten(1), None
    spread = (*SHAPE[: 1 + dims], *(1,) * (3 - dims))
    if carries:
        carried = -torch.rand(4, *SHAPE[: 1 + dims], device=device)
        messages = torch.cat([messages, carried.flatten(1)], dim=1)
        logs = torch.stack([carried[slot].double().view(spread) for slot in SLOTS])
    elif rates is not None:
        log_decay = rates
        row = rates.double()[None].view(1, *spread[1:])
        logs = torch.stack([row * tokens for tokens in TOKENS])
    else:
        logs = torch.zeros(len(SLOTS), 1, 1, 1, 1, dtype=torch.float64, device=device)
    table = ChainTable.of(BOUNDS, SLOTS, TOKENS, torch.device(device))
    found = chain_sums(messages, table, SHAPE, carries=carries, log_decay=log_decay)
    expected = _expected(states.double(), logs.expand(len(SLOTS), *SHAPE))
    assert_close(found, expected, what="entries", dim=0)


def test_a_document_that_does_not_reach_a_link_is_not_read() -> None:
    device = _device()
    messages = torch.randn(4, NUMEL, device=device)
    messages[[SLOTS[0], SLOTS[1]]] = torch.nan
    table = ChainTable.of([(2, 4)], SLOTS, TOKENS, torch.device(device))
    log_decay = torch.full((H,), -0.1, device=device)
    found = chain_sums(messages, table, SHAPE, carries=False, log_decay=log_decay)
    assert found.isfinite().all()
