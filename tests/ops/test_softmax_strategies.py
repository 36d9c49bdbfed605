"""Ulysses, usp, gather, halo and auto on gloo ranks against the whole stream in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from seqpar.layout import SequenceLayout
from tests.ops.softmax_cases import Case, assert_exact, layouts, run_case, run_cases
from tests.ranks import run_ranks

DOCUMENTS = (0, 3, 40, 41, 77)
MASKS = [(True, None), (False, None), (True, 9), (False, 9)]
STRATEGIES = [("ulysses", {}), ("usp", {}), ("gather", {}), ("auto", {})]


def _cases(world_size: int) -> list[Case]:
    made = [
        Case(layout, strategy, heads=8, kv_heads=4, causal=causal, window=window, options=options)
        for layout in layouts(DOCUMENTS, world_size)[:3]
        for causal, window in MASKS
        for strategy, options in [*STRATEGIES, *([("halo", {})] if window else [])]
    ]
    zigzag = SequenceLayout.zigzag(DOCUMENTS, world_size)
    # Heads that do not divide: cut head groups, one key/value head, fewer than ranks.
    made += [
        Case(zigzag, "ulysses", heads=heads, kv_heads=kv_heads, value_dim=6)
        for heads, kv_heads in ((8, 1), (9, 3), (10, 5), (12, 2), (11, 11))
        if heads >= world_size
    ]
    made += [
        Case(layout, "usp", heads=6, kv_heads=2, options={"ulysses_degree": degree})
        for layout in layouts((0, 61), world_size)
        for degree in range(1, 7)
        if world_size % degree == 0
    ]
    made.append(Case(zigzag, "gather", batch=2, key_dim=6, dtype=torch.float64))
    made.append(Case(zigzag, "usp", batch=2, key_dim=6, dtype=torch.float64))
    made += [
        Case(zigzag, strategy, options={"scale": 0.6}) for strategy in ("ring", "gather", "usp")
    ]
    return made


def _cross_cases(world_size: int) -> list[Case]:
    keys = (0, 20, 22, 30, 53)
    return [
        Case(layout, strategy, causal=False, key_layout=key_layout, heads=8, late=late)
        for layout in layouts(DOCUMENTS, world_size)[:2]
        for key_layout in layouts(keys, world_size)[:3]
        for strategy in ("ring", "ulysses", "usp", "gather", "auto")
        for late in (False, *[True] * (strategy == "ring"))
    ]


@pytest.mark.parametrize("world_size", range(2, 9))
def test_strategies_equal_one_device(world_size: int) -> None:
    few = _few_cases(world_size)
    cases = [*_cases(world_size), *few, *(replace(case, late=True) for case in few)]
    results = run_ranks(world_size, run_cases, cases)
    for i, case in enumerate(cases):
        assert_exact(case, [result[i] for result in results])


def _few_cases(world_size: int) -> list[Case]:
    """Every strategy and mask once, on a layout that balances nothing, heads that do not divide."""
    uneven = layouts(DOCUMENTS, world_size)[-1]
    return [
        Case(uneven, strategy, heads=9, kv_heads=3, causal=causal, window=window)
        for causal, window in MASKS
        for strategy in ("ring", "ulysses", "usp", "gather", "auto", *(["halo"] if window else []))
    ]


@pytest.mark.parametrize("case", _few_cases(1), ids=str)
def test_strategies_need_no_group_on_one_rank(case: Case) -> None:
    assert_exact(case, [run_case(0, case)])


@pytest.mark.parametrize("world_size", range(1, 9))
def test_cross_attention_equals_one_device(world_size: int) -> None:
    cases = _cross_cases(world_size)
    results = run_ranks(world_size, run_cases, cases)
    for i, case in enumerate(cases):
        assert_exact(case, [result[i] for result in results])
