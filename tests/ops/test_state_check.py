"""Calls that would give wrong numbers or leave a rank waiting are refused, on all ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqpar.errors import SeqparError
from seqpar.layout import SequenceLayout, Span
from seqpar.ops.state import state_attention
from tests.ops.cases import HEADS, KEY_DIM, VALUE_DIM, make_stream
from tests.ranks import run_ranks

TOKENS = 24
EVEN = SequenceLayout.contiguous((0, TOKENS), 2)
ALL_ON_RANK_0 = SequenceLayout((0, TOKENS), ((Span(0, TOKENS),), ()))
DECAY = torch.tensor([0.0, -0.05, -1.5])
STATE = torch.zeros(HEADS, KEY_DIM, VALUE_DIM)

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a decay in half precision": ({"log_decay": DECAY.bfloat16()}, "must be float32"),
    "a decay for other heads": ({"log_decay": DECAY[:2]}, "log_decay has shape (2,)"),
    "a decay that learns": ({"log_decay": DECAY.clone().requires_grad_()}, "gets no gradient"),
    "a decay that is no number": ({"log_decay": DECAY * torch.nan}, "log_decay of head 0 is nan"),
    "a growth": ({"log_decay": -DECAY}, "log_decay of head 1 is 0.05"),
    "a state elsewhere": ({"initial_state": STATE.to("meta")}, "initial_state is on meta"),
}
"""What no rank can take, and what is said."""

DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "no decay": ({"log_decay": None}, "'no decay'"),
    "another decay": ({"log_decay": 2 * DECAY}, "a fixed decay, checksum"),
    "nothing left out": ({"truncate": False}, "nothing left out"),
    "final states": ({"return_final_state": True}, "'with final states'"),
    "an initial state": ({"initial_state": STATE}, "'an initial state'"),
    "another exchange": ({"exchange": "pipelined_chain"}, "'pipelined_chain'"),
    "wider tokens": ({"dtype": torch.float64}, "torch.float64"),
}
"""What one rank alone is given, and what is said."""


def _call(rank: int, layout: SequenceLayout, options: dict[str, Any]) -> str:
    """What the rank is told."""
    options = {"dtype": torch.float32, **options}
    stream = make_stream(layout.cu_seqlens, "none", dtype=options.pop("dtype"))
    q, k, v = (layout.shard(x, rank) for x in stream.tensors)
    with pytest.raises(SeqparError) as caught:
        state_attention(q, k, v, layout=layout, group=dist.group.WORLD, **options)
    return str(caught.value)


def _calls(rank: int) -> list[tuple[str, str, str]]:
    found = []
    for what, (given, words) in (REFUSED | DIFFERENT).items():
        others: dict[str, Any] = {"log_decay": DECAY}
        if what in REFUSED and "initial_state" in given:
            others["initial_state"] = STATE
        found.append((what, words, _call(rank, EVEN, others | (given if rank else {}))))
    for what, (given, words) in REFUSED.items():
        options = {"log_decay": DECAY} | given
        found.append((f"{what}, of all", words, _call(rank, ALL_ON_RANK_0, options)))
    return found


def test_what_one_rank_cannot_take_is_refused_on_all() -> None:
    for rank, found in enumerate(run_ranks(2, _calls)):
        for what, words, message in found:
            assert words in message, (rank, what)
