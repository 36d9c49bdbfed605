"""Bytes that each rank receives, each way, against the formulas of the exchanges' docstrings."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar import comm
from seqpar.layout import SequenceLayout
from seqpar.ops.state import state_attention
from seqpar.ops.state_exchange import EXCHANGES
from tests.ops.cases import HEADS, KEY_DIM, VALUE_DIM, layouts, make_stream
from tests.ranks import run_ranks

W, BATCH = 5, 2
NAMES = [*sorted(EXCHANGES), "all_to_all"]
LAYOUTS = [
    layout
    for bounds in ((0, 61), (0, 9, 10, 26, 61), (0, 13, 25, 37, 49, 61))
    for layout in layouts(bounds, W).values()
]
"""One document, several, and documents that end with spans; one rank of some holds nothing."""
SLOW, FORGETS = torch.tensor([0.0, -0.05, -1.5]), torch.tensor([-4.0, -0.01, -9.0])
DECAYS = {"none": None, "fixed": SLOW, "per token": None, "forgets": FORGETS}


@dataclass(frozen=True)
class Call:
    layout: SequenceLayout
    exchange: str
    decay: str
    truncate: bool = False
    final: bool = False


def _calls() -> Iterator[Call]:
    for index, layout in enumerate(LAYOUTS):
        for exchange in NAMES:
            for decay in ("none", "fixed", "per token"):
                yield Call(layout, exchange, decay, final=index % 2 == 1)
            yield Call(layout, exchange, "forgets", truncate=True)
            yield Call(layout, exchange, "forgets")


CALLS = list(_calls())


@dataclass(frozen=True)
class Moved:
    """By one rank, each way."""

    received: tuple[int, int]
    saved: tuple[int, int]


def _moved(call: Call, rank: int) -> Moved:
    kind = "per token" if call.decay == "per token" else "none"
    stream = make_stream(call.layout.cu_seqlens, kind, batch=BATCH, dtype=torch.float32)
    leaves = [call.layout.shard(x, rank).requires_grad_() for x in stream.tensors]
    q, k, v, *decays = leaves
    with comm.count_traffic() as traffic:
        o, finals = state_attention(
            q,
            k,
            v,
            log_decay=decays[0] if decays else DECAYS[call.decay],
            layout=call.layout,
            group=dist.group.WORLD,
            exchange=call.exchange,
            truncate=call.truncate,
            return_final_state=call.final,
            check=False,
        )
    forward = traffic.received_bytes, traffic.saved_bytes
    loss: Tensor = o.sum() if finals is None else o.sum() + finals.sum()
    loss.backward()  # counts where its forward did
    both = traffic.received_bytes, traffic.saved_bytes
    ways = [(x, y - x) for x, y in zip(forward, both, strict=True)]
    return Moved(*ways)


def _all_moved(rank: int) -> list[Moved]:
    return [_moved(call, rank) for call in CALLS]


@pytest.fixture(scope="module")
def moved() -> dict[Call, list[Moved]]:
    """By call: what each rank moved."""
    found = run_ranks(W, _all_moved)
    return {call: [of_rank[i] for of_rank in found] for i, call in enumerate(CALLS)}


# -- the formulas, from stream positions alone ------------------------------------------------


@dataclass(frozen=True)
class Piece:
    rank: int
    start: int
    stop: int
    first_document: int
    last_document: int


def _chain(layout: SequenceLayout, *, backward: bool) -> list[Piece]:
    """The pieces of the stream in the order in which states, or their gradients, travel."""
    document = [d for d, n in enumerate(_lengths(layout)) for _ in range(n)]
    pieces = [
        Piece(rank, a, b, document[a], document[b - 1])
        for rank, spans in enumerate(layout.spans)
        for a, b in spans
    ]
    pieces.sort(key=lambda piece: piece.start)
    if not backward:
        return pieces
    turned = [replace(p, first_document=p.last_document, last_document=p.first_document)
              for p in pieces]  # fmt: skip
    return turned[::-1]


def _lengths(layout: SequenceLayout) -> list[int]:
    bounds = layout.cu_seqlens
    return [b - a for a, b in itertools.pairwise(bounds)]


def _reaches(pieces: list[Piece], source: int, target: int) -> bool:
    """Whether the document that leaves one piece is the one that another begins with."""
    if source < 0 or target >= len(pieces):
        return False
    return pieces[source].last_document == pieces[target].first_document


def _heads(call: Call, tokens: int) -> int:
    """Heads of which something is left after so many tokens."""
    decay = DECAYS[call.decay]
    if not call.truncate or decay is None:
        return HEADS
    return int((decay * tokens >= -24 * math.log(2)).sum())


def _expected(call: Call, rank: int, *, backward: bool) -> int:
    if call.exchange == "all_to_all":
        return _by_heads(call, rank, backward=backward)
    pieces = _chain(call.layout, backward=backward)
    per_token = call.decay == "per token"
    takers = [i for i, p in enumerate(pieces) if p.rank == rank and _reaches(pieces, i - 1, i)]
    head = 4 * BATCH * KEY_DIM * VALUE_DIM
    head_message = head + (4 * BATCH if per_token else 0)
    if call.exchange in ("chain", "pipelined_chain"):
        return len(takers) * head * HEADS
    if call.exchange == "log_step":
        return _doubling(call, pieces, rank, head_message)
    givers = [p.rank for i, p in enumerate(pieces) if _reaches(pieces, i, i + 1)]
    if not givers:
        return 0
    most = max(givers.count(r) for r in range(W))
    passing = [
        p.stop - p.start
        for i, p in enumerate(pieces)
        if _reaches(pieces, i - 1, i + 1) and p.first_document == p.last_document
    ]
    far = _heads(call, min(passing)) if passing else HEADS
    return (W - 1) * most * far * head_message + len(takers) * (HEADS - far) * head


def _doubling(call: Call, pieces: list[Piece], rank: int, head_message: int) -> int:
    total = 0
    for hop in (1, 2, 4, 8, 16):
        for target, piece in enumerate(pieces):
            source = target - hop
            if piece.rank == rank and _reaches(pieces, source, target):
                between = sum(p.stop - p.start for p in pieces[source + 1 : target])
                if pieces[source].rank != rank:
                    total += _heads(call, between) * head_message
    return total


def _by_heads(call: Call, rank: int, *, backward: bool) -> int:
    heads = [HEADS * (r + 1) // W - HEADS * r // W for r in range(W)]
    inputs = 4 * (2 * KEY_DIM + VALUE_DIM + (call.decay == "per token"))
    to_heads, to_tokens = (4 * VALUE_DIM, inputs) if backward else (inputs, 4 * VALUE_DIM)
    others = [r for r in range(W) if r != rank]
    tokens_in = sum(call.layout.tokens_on(p) for p in others) * heads[rank]
    tokens_back = call.layout.tokens_on(rank) * sum(heads[p] for p in others)
    return BATCH * (tokens_in * to_heads + tokens_back * to_tokens)


def _of_finals(call: Call) -> int:
    state = KEY_DIM * VALUE_DIM * HEADS
    return 2 * (W - 1) * 4 * BATCH * call.layout.num_documents * state // W if call.final else 0


# -- the tests --------------------------------------------------------------------------------


@pytest.mark.parametrize("exchange", NAMES)
def test_counted_bytes_equal_the_formulas(exchange: str, moved: dict[Call, list[Moved]]) -> None:
    for call, ranks in moved.items():
        if call.exchange != exchange:
            continue
        for rank, found in enumerate(ranks):
            for way, backward in enumerate((False, True)):
                expected = _expected(call, rank, backward=backward) + _of_finals(call)
                assert found.received[way] == expected, (call, rank, backward)


def test_what_is_reported_as_saved_is_not_received(moved: dict[Call, list[Moved]]) -> None:
    saved = dict.fromkeys(NAMES, 0)
    for call, ranks in moved.items():
        for rank, found in enumerate(ranks):
            if not call.truncate:
                assert found.saved == (0, 0), (call, rank)
                continue
            whole = moved[replace(call, truncate=False)][rank]
            for way in (0, 1):
                assert found.received[way] + found.saved[way] == whole.received[way], (call, rank)
                saved[call.exchange] += found.saved[way]
    assert saved["all_gather"] > 0
    assert saved["log_step"] > 0
