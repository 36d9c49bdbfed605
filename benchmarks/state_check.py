"""Whether benchmarks/bench_state.py times what is right: scattered layers against one device."""

from __future__ import annotations

from typing import Any

import torch
from state_timing import Setup
from torch import Tensor

from seqpar import comm
from seqpar.kernels.lightning import lightning_attention
from seqpar.layout import SequenceLayout
from seqpar.ops.state import state_attention

__all__ = ["check"]

TOLERANCE = 8e-3
"""Relative error of bfloat16 results, as in the tests."""


def check(setup: Setup, decay_names: list[str], exchanges: list[str]) -> dict[str, Any]:
    """Relative errors of o and the gradients against one device in float64, worst rank.

    May be at most the table's, or a quarter more than that of the kernel on one device.
    """
    errors: dict[str, dict[str, float]] = {}
    failures = 0
    bounds = (0, 700, 701, 3000, 4099)
    layouts = {
        "contiguous": SequenceLayout.contiguous(bounds, setup.world_size),
        "zigzag": SequenceLayout.zigzag(bounds, setup.world_size),
    }
    per_token = -setup.stream(bounds[-1], 1)[0][..., 0].float().abs()
    fast = setup.slopes().clamp(max=-0.5) * 4
    decays: dict[str, Tensor | None] = {
        "none": None,
        "slopes": setup.slopes(),
        "fast": fast,
        "per token": per_token * 0.1,
    }
    for kind, layout in layouts.items():
        for name in decay_names:
            expected = _one_device(setup, layout, decays[name], torch.float64)
            kernel = _one_device(setup, layout, decays[name], setup.dtype)
            own = _worst(setup, layout, [layout.shard(x, setup.rank) for x in kernel], expected)
            for exchange in exchanges:
                found = _scattered(setup, layout, decays[name], exchange)
                worst = _worst(setup, layout, found, expected)
                limit = max(TOLERANCE, 1.25 * own)
                errors[f"{kind}, {name}, {exchange}"] = {"error": worst, "one device": own}
                if not worst <= limit:
                    setup.say(f"FAILED {kind}, decay {name}, {exchange}: {worst:.2e} > {limit:.2e}")
                    failures += 1
    setup.say(
        f"correct: {len(errors) - failures} of {len(errors)} cases, worst relative error "
        f"{max(e['error'] for e in errors.values()):.2e}, of one device in the same dtype "
        f"{max(e['one device'] for e in errors.values()):.2e}"
    )
    return errors


def _worst(
    setup: Setup, layout: SequenceLayout, found: list[Tensor], expected: list[Tensor]
) -> float:
    """The largest relative error of any tensor on any rank."""
    pairs = zip(found, expected, strict=True)
    worst = max(_relative(x, layout.shard(ref, setup.rank)) for x, ref in pairs)
    return float(comm.all_gather(torch.tensor(worst, device=setup.device), setup.group).max())


def _one_device(
    setup: Setup, layout: SequenceLayout, decay: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    *inputs, do = setup.stream(layout.num_tokens)
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    bounds = torch.tensor(layout.cu_seqlens, dtype=torch.int32)
    o, _ = lightning_attention(*leaves, log_decay=decay, cu_seqlens=bounds)
    return [o.detach(), *torch.autograd.grad(o, leaves, do.to(dtype))]


def _scattered(
    setup: Setup, layout: SequenceLayout, decay: Tensor | None, exchange: str
) -> list[Tensor]:
    *inputs, do = (layout.shard(x, setup.rank) for x in setup.stream(layout.num_tokens))
    leaves = [x.requires_grad_() for x in inputs]
    if decay is not None and decay.ndim == 3:
        decay = layout.shard(decay, setup.rank)
    o, _ = state_attention(
        *leaves, log_decay=decay, layout=layout, group=setup.group, exchange=exchange
    )
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


def _relative(out: Tensor, ref: Tensor) -> float:
    difference = (out.double() - ref.double()).norm() / ref.double().norm()
    return float(difference) if torch.isfinite(difference) else float("inf")
