"""A long stream in pieces: each piece's last state enters the next, with gradients through it."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.layout import SequenceLayout
from seqpar.ops.state import state_attention
from tests.ops.cases import Stream, make_stream, truth
from tests.ranks import run_ranks
from tests.tolerances import assert_close

TOKENS = 57
CUTS = (0, 9, 30, 31, TOKENS)
EXCHANGES = ("auto", "all_gather", "chain", "pipelined_chain", "log_step", "all_to_all")


def _piecewise(rank: int, stream: Stream) -> list[list[Tensor]]:
    """For each exchange: this rank's o and gradients of every piece, in order."""
    found = []
    for exchange in EXCHANGES:
        state: Tensor | None = None
        outs, leaves, loss = [], [], torch.zeros(())
        for number, (start, stop) in enumerate(itertools.pairwise(CUTS)):
            make = (SequenceLayout.contiguous, SequenceLayout.zigzag)[number % 2]
            layout = make((0, stop - start), dist.get_world_size())
            local = [layout.shard(x[:, start:stop], rank) for x in stream.tensors]
            leaves.append([x.requires_grad_() for x in local])
            q, k, v, *decays = leaves[-1]
            o, state = state_attention(
                q,
                k,
                v,
                log_decay=decays[0] if decays else stream.log_decay,
                layout=layout,
                group=dist.group.WORLD,
                initial_state=state,
                return_final_state=True,
                exchange=exchange,
            )
            outs.append(o.detach())
            loss = loss + (o * layout.shard(stream.do[:, start:stop], rank)).sum()
        assert state is not None
        # Every rank has the final state; each puts in its share of the loss on it.
        loss = loss + (state * stream.dfinals).sum() / dist.get_world_size()
        grads = torch.autograd.grad(loss, [x for piece in leaves for x in piece])
        found.append([*outs, *grads])
    return found


@pytest.mark.parametrize("decay", ["fixed", "per token"])
def test_pieces_are_the_whole(decay: str) -> None:
    stream = make_stream((0, TOKENS), decay, batch=2, dtype=torch.float32)
    count = len(stream.tensors)
    expected = truth(stream, (0, TOKENS))
    results = run_ranks(2, _piecewise, stream)
    for index, exchange in enumerate(EXCHANGES):
        pieces: list[list[Tensor]] = [[] for _ in range(1 + count)]
        for number, (start, stop) in enumerate(itertools.pairwise(CUTS)):
            make = (SequenceLayout.contiguous, SequenceLayout.zigzag)[number % 2]
            layout = make((0, stop - start), 2)
            places = [number, *(len(CUTS) - 1 + count * number + i for i in range(count))]
            for kind, place in enumerate(places):
                pieces[kind].append(layout.unshard([r[index][place] for r in results]))
        references = (expected.o, *expected.grads)
        names = ("o", "dq", "dk", "dv", "dlog_decay")[: 1 + count]
        for name, parts, ref in zip(names, pieces, references, strict=True):
            assert_close(torch.cat(parts, 1), ref, what=f"{exchange}: {name}")
