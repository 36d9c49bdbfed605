"""Tokens a second on all ranks, by strategy and peer, against one GPU on the same stream.

Share: what the GPUs would take together at the speed that each has on the whole stream by itself,
over what they take (for equal GPUs: one's time over ranks times ours). The ways take turns, so that
clocks and temperature are alike for all, and results are yielded after every round. A layer's state
calls are repeated from the third call of a kind on (docs/state.md), so a model with states is
warmed up twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from benchmarks.wrap_peers import deepspeed_ulysses, torch_context_parallel
from benchmarks.wrap_turns import Step, Way, in_turns
from benchmarks.wrapped import FAILURES, LLAMA, MINIMAX, Machine
from seqpar.comm import shares_memory
from seqpar.loss import chunked_token_loss
from seqpar.mesh import GroupPool
from seqpar.wrap import parallelize, unparallelize

ROUNDS = 2
ONE = "one_gpu"


def hybrid(machine: Machine) -> Iterator[dict[str, Any]]:
    """A MiniMax-shaped model, 65,536 tokens a rank."""
    count = machine.tokens(65536) * machine.ranks
    model = machine.model("minimax", MINIMAX, checkpointed=True)
    ways = _own(machine, model, count)
    pool, ranks = GroupPool(share_memory=False), tuple(range(machine.ranks))
    pool.prepare([ranks])
    if shares_memory(machine.mesh.get_group()):  # as meshes do by default
        over_nccl = pool.group(ranks)
        ways["ring_zigzag_nccl"] = _wrapped(machine, model, count, over_nccl, "ring", "zigzag")
    yield from _rates(machine, model, count, ways, warm=2)


def scaling(machine: Machine) -> Iterator[dict[str, Any]]:
    """A Llama-shaped model, and what its peers make of it."""
    count = machine.tokens(65536)
    model = machine.model("llama", LLAMA, checkpointed=True)
    ways = _own(machine, model, count)
    ways["torch_context_parallel"] = _peer(
        machine, functools.partial(torch_context_parallel, machine, model, count)
    )
    with ExitStack() as stack:
        found: dict[str, Any] = {}
        try:
            peer = stack.enter_context(deepspeed_ulysses(machine, model, tiled_mlp=False))
            ways["deepspeed_ulysses"] = _peer(machine, functools.partial(peer, count))
        except FAILURES as error:
            found["deepspeed_ulysses"] = f"{type(error).__name__}: {error}"[:300]
        for timed in _rates(machine, model, count, ways, warm=1):
            yield {**timed, **found}


def _own(machine: Machine, model: nn.Module, count: int) -> dict[str, Way]:
    return {
        ONE: _wrapped(machine, model, count, None, "auto", "contiguous"),
        "ring_zigzag": _wrapped(machine, model, count, machine.mesh, "ring", "zigzag"),
        "ulysses_contiguous": _wrapped(
            machine, model, count, machine.mesh, "ulysses", "contiguous"
        ),
    }


def _wrapped(
    machine: Machine, model: nn.Module, count: int, where: Any, strategy: Any, layout: str
) -> Way:
    batch = machine.batch(count, where, layout)  # one layout: it is part of a state call's kind

    def step() -> Tensor:
        loss = chunked_token_loss(model, batch)
        loss.backward()
        return loss.detach()

    @contextmanager
    def way() -> Iterator[Step]:
        parallelize(model, where, strategy=strategy)
        try:
            yield step
        finally:
            unparallelize(model)

    return way


def _peer(machine: Machine, step: Callable[[], Tensor]) -> Way:
    """Of a step that returns its rank's share of the mean."""
    return functools.partial(nullcontext, lambda: machine.total(float(step())))


def _rates(
    machine: Machine, model: nn.Module, count: int, ways: dict[str, Way], *, warm: int
) -> Iterator[dict[str, Any]]:
    """What is known after each round."""
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": count,
    }
    for timed in in_turns(machine, model, ways, rounds=ROUNDS, warm=warm):
        for name, times in timed.items():
            ranks = 1 if name == ONE else machine.ranks
            found[name] = times.failure or {
                "ms": times.ms,
                "ms_by_round": times.series_ms,
                "ms_by_rank": times.by_rank_ms,
                "tokens_per_s_per_gpu": round(count / times.ms * 1e3 / ranks),
                "share_of_ideal": 1.0 if name == ONE else round(timed[ONE].shared_ms / times.ms, 4),
                "loss": round(times.loss, 5),
            }
        yield dict(found)
