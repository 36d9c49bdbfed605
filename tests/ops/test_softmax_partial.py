"""Sums of partial results: any order, any overlap, one rounding for two terms."""

from __future__ import annotations

import random

import pytest
import torch

from seqpar.ops.softmax_merge import merge_lse_torch_
from seqpar.ops.softmax_partial import PartialOutput, RowSum
from tests.tolerances import relative_error

SHAPE = (2, 24, 4, 6)
MANY_ROWS = (1, 512, 4, 16)
ONE_ROUNDING = 1.95e-3
"""To bfloat16, in norm: 1.63e-3 to 1.83e-3 in sixty draws. A second one makes it 2.1e-3 or more."""


def _parts(seed: int, count: int) -> list[tuple[int, int, int, int]]:
    """Random (start, stop, head_start, head_stop), some of them whole."""
    draw = random.Random(seed)
    parts = []
    for _ in range(count):
        start, head = draw.randrange(24), draw.randrange(4)
        parts.append((start, draw.randint(start + 1, 24), head, draw.randint(head + 1, 4)))
    return parts + [(0, 24, 0, 4)] * draw.randint(0, 2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(30))
def test_row_sum_is_the_sum(seed: int, dtype: torch.dtype) -> None:
    regions = _parts(seed, count=seed % 7)
    random.Random(seed).shuffle(regions)
    total, expected = RowSum(torch.empty(SHAPE, dtype=dtype)), torch.zeros(SHAPE).double()
    for start, stop, head, head_stop in regions:
        part = torch.randn(2, stop - start, head_stop - head, 6).to(dtype)
        expected[:, start:stop, head:head_stop] += part.double()
        total.add(part, start=start, head_start=head)
    assert total.result().dtype == dtype
    # However many terms, no more than two roundings to 16 bits.
    limit = {torch.float64: 1e-15, torch.float32: 3e-7, torch.bfloat16: 5e-3}[dtype]
    assert relative_error(total.result(), expected) <= limit


@pytest.mark.parametrize("seed", range(30))
def test_lent_parts_are_read_and_no_more(seed: int) -> None:
    """Neither written, nor part of the result: spoilt afterwards, they change nothing."""
    draw = random.Random(seed)
    total, expected = RowSum(torch.empty(SHAPE).double()), torch.zeros(SHAPE).double()
    lent = []
    for start, stop, head, head_stop in _parts(seed, count=seed % 4):
        part = torch.randn(2, stop - start, head_stop - head, 6).double()
        expected[:, start:stop, head:head_stop] += part
        if is_lent := draw.random() < 0.5:
            lent.append((part, part.clone()))
        total.add(part, start=start, head_start=head, is_lent=is_lent)
    result = total.result()
    for part, before in lent:
        assert torch.equal(part, before)
        part.fill_(torch.nan)
    assert relative_error(result, expected) <= 1e-15


def test_two_terms_are_rounded_once() -> None:
    a, b = (torch.randn(SHAPE).bfloat16() for _ in range(2))
    total = RowSum(torch.empty_like(a))
    total.add(a[:, :, :2].clone())
    total.add(b.clone())
    total.add(a[:, :, 2:].clone(), head_start=2)
    assert torch.equal(total.result(), (a.double() + b.double()).bfloat16())


@pytest.mark.parametrize("count", [2, 3, 16])
def test_many_16_bit_terms_are_summed_in_float32(count: int) -> None:
    parts = [torch.randn(MANY_ROWS).bfloat16() for _ in range(count)]
    total = RowSum(torch.empty(MANY_ROWS, dtype=torch.bfloat16))
    for part in parts:
        total.add(part.clone())
    expected = torch.stack(parts).double().sum(0)
    assert relative_error(total.result(), expected) <= ONE_ROUNDING


@pytest.mark.parametrize("seed", range(20))
def test_partial_outputs_merge_in_any_order(seed: int) -> None:
    rows = [(start, stop) for start, stop, _, _ in _parts(seed, count=seed % 6)]
    q = torch.empty(SHAPE, dtype=torch.float64)
    merged = PartialOutput(q, 6)
    out = torch.zeros(SHAPE, dtype=torch.float64)
    lse = torch.full(SHAPE[:3], -torch.inf, dtype=torch.float64)
    for start, stop in rows:
        new_out = torch.randn(2, stop - start, 4, 6, dtype=torch.float64)
        new_lse = 3 * torch.randn(2, stop - start, 4, dtype=torch.float64)
        weights = torch.stack([lse[:, start:stop], new_lse]).softmax(0)[..., None]
        out[:, start:stop] = weights[0] * out[:, start:stop] + weights[1] * new_out
        lse[:, start:stop] = torch.logaddexp(lse[:, start:stop], new_lse)
        merged.add(new_out.clone(), new_lse.clone(), start=start)
    got_out, got_lse = merged.result()
    torch.testing.assert_close(got_out, out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got_lse, lse, rtol=1e-12, atol=1e-12)


def test_many_16_bit_parts_are_merged_in_float32() -> None:
    q = torch.empty(MANY_ROWS, dtype=torch.bfloat16)
    for count in (2, 3, 16):
        outs = [torch.randn(MANY_ROWS).bfloat16() for _ in range(count)]
        lses = [torch.randn(MANY_ROWS[:3]) for _ in range(count)]
        merged = PartialOutput(q, 16)
        for out, lse in zip(outs, lses, strict=True):
            merged.add(out.clone(), lse.clone())
        weights = torch.stack(lses).double().softmax(0)[..., None]
        expected = (weights * torch.stack(outs).double()).sum(0)
        out, lse = merged.result()
        assert relative_error(out, expected) <= ONE_ROUNDING, count
        assert lse.dtype == torch.float32
        assert relative_error(lse, torch.stack(lses).double().logsumexp(0)) <= 1e-6


def test_two_empty_rows_stay_empty() -> None:
    out, lse = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1), -torch.inf)
    merge_lse_torch_(out, lse, torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1), -torch.inf))
    assert torch.equal(out, torch.zeros(1, 1, 1, 4))
    assert torch.isneginf(lse).all()
