"""State operators over random layouts, documents, decays and options, against one device.

A failure names its seed: `_check_case(seed)` is that case again.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from seqpar.layout import SequenceLayout, Span
from seqpar.ops.state_exchange import EXCHANGES
from tests.ops.cases import HEADS, make_stream, truth
from tests.ops.state_simulated import check, simulated

NAMES = [*sorted(EXCHANGES), "all_to_all"]
FIXED = (0.0, -1e-9, -1e-4, -0.05, -0.4, -1.0, -3.0, -8.0, -20.0, -60.0)
PER_TOKEN = (0.0, 1e-7, 0.1, 3.0, 20.0)
"""From what never forgets to what sees each token alone."""


def _layout(rng: random.Random) -> SequenceLayout:
    """Documents of 1 token and of many; spans of any length anywhere, ranks without any."""
    tokens, world_size = rng.choice([1, 2, 5, 17, 60, 150]), rng.randint(1, 8)
    lengths: list[int] = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, rng.choice([1, 1, 2, 3, 9, 30, tokens])))
    rng.shuffle(lengths)
    cuts = sorted({0, tokens, *(rng.randint(0, tokens) for _ in range(rng.randint(1, 16)))})
    spans: list[list[Span]] = [[] for _ in range(world_size)]
    for start, stop in itertools.pairwise(cuts):
        rng.choice(spans).append(Span(start, stop))
    return SequenceLayout((0, *itertools.accumulate(lengths)), tuple(map(tuple, spans)))


def _decay(rng: random.Random, decay: str, drawn: Tensor | None) -> Tensor | None:
    if decay == "none" or drawn is None:
        return None
    if decay == "fixed":
        return torch.tensor([rng.choice(FIXED) for _ in range(HEADS)])
    scales = [rng.choice(PER_TOKEN) for _ in range(drawn.numel())]
    return drawn * torch.tensor(scales, dtype=drawn.dtype).view(drawn.shape)


def _check_case(seed: int) -> None:
    rng = random.Random(seed)
    layout, decay = _layout(rng), rng.choice(["none", "fixed", "fixed", "per token"])
    truncate = rng.random() < 0.5
    # What is cut off is exact to float32.
    dtype = torch.float32 if truncate or rng.random() < 0.3 else torch.float64
    options = {"batch": rng.choice([1, 2]), "initial": rng.random() < 0.5, "dtype": dtype}
    stream = make_stream(layout.cu_seqlens, decay, seed=seed, **options)
    stream = replace(stream, log_decay=_decay(rng, decay, stream.log_decay))
    exchange = rng.choice(NAMES)
    whole = exchange == "all_gather" and rng.random() < 0.5
    ways = {"truncate": truncate, "whole": whole, "overlap": rng.random() < 0.5}
    ways["asks_finals"] = rng.random() < 0.5
    if not ways["asks_finals"]:
        stream = replace(stream, dfinals=torch.zeros_like(stream.dfinals))
    found = simulated(stream, layout, exchange, **ways)
    check(found, truth(stream, layout.cu_seqlens), f"seed {seed}: {exchange}, {ways}, {layout}")


@pytest.mark.parametrize("first", range(0, 300, 50))
def test_random_cases_give_the_one_device_result(first: int) -> None:
    for seed in range(first, first + 50):
        _check_case(seed)
