"""Scattered calls repeated from recordings give the bits of the general path, on gloo ranks.

Kernels are interpreted, and launched on what lies at the addresses that a driver would read. On
GPUs tests/ops/state_on_gpus.py and tests/test_repeated_steps.py do so.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar import comm
from seqpar.kernels import chain_sum
from seqpar.kernels.recorder import current_recorder
from seqpar.layout import SequenceLayout
from seqpar.ops import state, state_gather, steps
from seqpar.ops.state_recorded import recorded_call
from tests.ranks import run_ranks

TOKENS, HEADS, DIM, TURNS = 96, 2, 16, 3
FIXED = torch.tensor([-0.01, -0.02])
PACKED = (0, 10, 11, 60, TOKENS)
CASES = {
    "per token": (SequenceLayout.contiguous((0, TOKENS), 2), "per token"),
    "per token, zigzag, documents": (SequenceLayout.zigzag(PACKED, 2), "per token"),
    "fixed, zigzag": (SequenceLayout.zigzag((0, TOKENS), 2), "fixed"),
    "none, documents": (SequenceLayout.contiguous(PACKED, 2), "none"),
}


def _gather(x: Tensor, group: Any, *, gives: bool, sources: Any) -> Tensor:
    """As a device's all_gather is queued, over gloo."""

    def run(gathered: Tensor, message: Tensor) -> None:
        comm._GATHER(gathered.view(-1), message.view(-1), group=group)

    message = x.contiguous()
    gathered = message.new_empty((2, *message.shape))
    recorder = current_recorder()
    if recorder is None:
        run(gathered, message)
    else:
        recorder.do(run, gathered, message)
    return gathered


def _call(case: str, turn: int, rank: int, *, repeats: bool) -> tuple[list[Tensor], bool]:
    """o and gradients, by the call that CUDA ranks make; whether it was repeated."""
    layout, kind = CASES[case]
    generator = torch.Generator().manual_seed(turn)
    shape = (1, TOKENS, HEADS, DIM)
    drawn = [torch.randn(shape, generator=generator) for _ in range(4)]
    per_token = -torch.rand(shape[:3], generator=generator) * 0.1
    *leaves, do = (layout.shard(x, rank).clone() for x in drawn)
    decay = {"fixed": FIXED, "none": None}.get(kind, layout.shard(per_token, rank).clone())
    if kind == "per token":
        leaves.append(decay)
    for leaf in leaves:
        leaf.requires_grad_()
    q, k, v = leaves[:3]
    group = dist.group.WORLD
    call = recorded_call(q, k, v, decay, layout, group, ("all_gather",)) if repeats else None
    repeated = call is not None and call.is_ready
    if call is not None and repeated:
        o = call(q, k, v, decay)
    else:
        mixer, inputs = state._lightning(q, k, v, decay, truncate=True)
        plan = state._plan(
            mixer, inputs, layout, group, (None, False), "all_gather", False, None, False
        )
        o, _ = state._scatter(mixer, inputs, plan, group, None, False, call)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)], repeated


def _rank(rank: int) -> dict[str, list[bool]]:
    from tests.kernels.recorded_layer import launch_by_address

    done = {}
    with pytest.MonkeyPatch.context() as patch:
        launch_by_address(patch)
        for module in (chain_sum, state_gather):
            patch.setattr(module, "can_sum", lambda messages: True)
        patch.setattr(steps.comm, "all_gather", _gather)
        for case in CASES:
            done[case] = []
            for turn in range(TURNS):
                expected, _ = _call(case, turn, rank, repeats=False)
                found, repeated = _call(case, turn, rank, repeats=True)
                done[case].append(repeated)
                for index, (x, ref) in enumerate(zip(found, expected, strict=True)):
                    assert ref.isfinite().all(), (case, index)
                    assert torch.equal(x, ref), (case, turn, index)
    return done


def test_calls_over_every_layout_are_repeated_bit_for_bit() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported, and no GPU")
    for done in run_ranks(2, _rank, timeout_s=240.0):
        assert done == {case: [False, False, True] for case in CASES}
