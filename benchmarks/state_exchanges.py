"""The exchanges of benchmarks/bench_state.py alone, beside nothing: what the time model is held to.

Each row has the device's time by exchange, from CUDA graphs where there are any, and `eager_ms`.
Calls follow one another without a pause, so that a chain's hops of one call meet those of the next:
what is read there is how often it can be done, less than how long one takes.

Legend: T tokens of one rank, W ranks, H heads, D key and value dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from state_timing import Setup, graphed, take_turns
from torch import Tensor

from seqpar import comm
from seqpar.layout import SequenceLayout
from seqpar.ops.state_exchange import EXCHANGES
from seqpar.ops.state_heads import Heads
from seqpar.ops.state_lightning import LightningMixer
from seqpar.ops.state_local import RankPart
from seqpar.ops.state_mixer import Summary
from seqpar.ops.steps import run_steps

__all__ = ["time_state_exchanges", "time_token_exchanges"]


def time_state_exchanges(setup: Setup, every_heads: list[int]) -> list[dict[str, Any]]:
    """Each exchange of one state a rank."""
    rows = []
    for heads in every_heads:
        layout = SequenceLayout.contiguous((0, 64 * setup.world_size), setup.world_size)
        tokens = torch.zeros(1, 64, heads, setup.dim, device=setup.device, dtype=setup.dtype)
        part = RankPart.of(LightningMixer(), layout, setup.rank, (tokens,) * 3)
        state = torch.randn(1, heads, setup.dim, setup.dim, device=setup.device)
        forms = {
            name: _of_states(part, (tokens,) * 3, Summary(state, None), name, setup.nccl_group)
            for name in sorted(EXCHANGES)
        }
        if comm.shares_memory(setup.group):
            forms["all_gather, peers"] = _of_states(
                part, (tokens,) * 3, Summary(state, None), "all_gather", setup.group
            )
        times = _times(setup, f"{state.numel() / 2**18:.1f} MiB of state a rank", forms)
        rows.append({"state_bytes": state.numel() * 4, **times})
    return rows


def time_token_exchanges(setup: Setup, every_tokens: list[int]) -> list[dict[str, Any]]:
    """all_to_all by tokens a rank: q, k and v to the ranks of their heads, and o back."""
    rows = []
    for tokens in every_tokens:
        q, k, v, _ = setup.stream(tokens)
        layout = SequenceLayout.contiguous((0, tokens * setup.world_size), setup.world_size)
        heads = Heads(layout, setup.rank, setup.heads)
        form = _of_tokens(heads, (q, k, v), setup.group)
        rows.append({"tokens": tokens, **_times(setup, f"{tokens} tokens", {"all_to_all": form})})
    return rows


def _times(setup: Setup, what: str, forms: dict[str, Callable[[], None]]) -> dict[str, Any]:
    eager = {name: t.ms for name, t in take_turns(setup, forms).items()}
    device = {name: t.ms for name, t in take_turns(setup, graphed(setup, forms)).items()}
    setup.say(
        f"exchange of {what}, ms (in a graph): "
        + ", ".join(f"{x} {eager[x]:.3f} ({device.get(x, 0):.3f})" for x in forms)
    )
    return {**eager, **device, "eager_ms": eager}


def _of_states(
    part: RankPart, inputs: tuple[Tensor, ...], summary: Any, name: str, group: Any
) -> Callable[[], None]:
    def run() -> None:
        run_steps(EXCHANGES[name](part.forward_scan(inputs, summary, None)), group)

    return run


def _of_tokens(heads: Heads, inputs: tuple[Tensor, ...], group: Any) -> Callable[[], None]:
    def run() -> None:
        *_, v = run_steps(heads.to_heads(inputs), group)
        run_steps(heads.to_tokens((v,)), group)  # o is shaped like v

    return run
