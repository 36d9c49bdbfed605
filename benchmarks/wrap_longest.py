"""The longest stream that trains: peak memory of a step, AdamW's states included, way by way.

Peaks at two lengths give a line; where it meets 95% of the device is the longest stream. A third
length, several times longer, says how well the line foretells (`--sections far`). Steps at the
longest length itself would take minutes each: attention is quadratic, memory is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.wrap_peers import deepspeed_ulysses, torch_context_parallel
from benchmarks.wrapped import LLAMA, Machine
from seqpar.loss import chunked_token_loss
from seqpar.tiles import tile_tokens
from seqpar.wrap import parallelize, unparallelize

LENGTHS = (32768, 98304)
FAR, FAR_WAYS = 262144, ("seqpar_ring_zigzag_tiled_mlp",)
SHARE_OF_DEVICE = 0.95
FAILURES = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError)
Step = Callable[[int], Tensor]


@contextmanager
def seqpar_ring(machine: Machine, model: nn.Module, *, tiled_mlp: bool) -> Iterator[Step]:
    """Forward and backward of the wrapped model: ring, zigzag, blockwise head."""
    parallelize(model, machine.mesh, strategy="ring")
    for name, module in model.named_modules() if tiled_mlp else ():
        if name.endswith(".mlp"):
            tile_tokens(module)

    def step(count: int) -> Tensor:
        loss = chunked_token_loss(model, machine.batch(count, machine.mesh, "zigzag"))
        loss.backward()
        return loss.detach()

    yield step
    unparallelize(model)


@contextmanager
def torch_ring(machine: Machine, model: nn.Module) -> Iterator[Step]:
    yield lambda count: torch_context_parallel(machine, model, count)


WAYS: dict[str, Callable[[Machine, nn.Module], Any]] = {
    "seqpar_ring_zigzag": lambda m, model: seqpar_ring(m, model, tiled_mlp=False),
    "seqpar_ring_zigzag_tiled_mlp": lambda m, model: seqpar_ring(m, model, tiled_mlp=True),
    "deepspeed_ulysses_tiled_loss": lambda m, model: deepspeed_ulysses(m, model, tiled_mlp=False),
    "deepspeed_ulysses_tiled_loss_and_mlp": lambda m, model: deepspeed_ulysses(
        m, model, tiled_mlp=True
    ),
    "torch_context_parallel": torch_ring,
}


class Trainer:
    """A Llama of 1B parameters, its layers recomputed, and AdamW with states in bf16."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.model = machine.model("llama", LLAMA, checkpointed=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=machine.cuda)

    def peak_gib(self, step: Step, count: int) -> float:
        """Peak memory of one step; only CUDA keeps the count."""
        self.machine.free()
        step(self.machine.tokens(count))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.machine.peak_gib() if self.machine.cuda else math.nan

    def peaks_gib(self, step: Step) -> dict[int, float]:
        self.peak_gib(step, LENGTHS[0])  # the optimizer's states exist after one step
        return {count: self.peak_gib(step, count) for count in LENGTHS}


def longest(machine: Machine) -> dict[str, Any]:
    """Peaks and the line through them, for seqpar and its peers."""
    trainer = Trainer(machine)
    found = {}
    for name, way in WAYS.items():
        try:
            with way(machine, trainer.model) as step:
                peaks = trainer.peaks_gib(step)
            found[name] = {"peak_gib": peaks, **_line(peaks)}
        except FAILURES as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    return found


def far(machine: Machine) -> dict[str, Any]:
    """One step at a length several times longer, and the peak that the line foretells."""
    if not machine.cuda:
        return {"left_out": "peak memory is read on CUDA only"}
    trainer = Trainer(machine)
    found: dict[str, Any] = {"tokens": machine.tokens(FAR)}
    for name in FAR_WAYS:
        with WAYS[name](machine, trainer.model) as step:
            peaks = trainer.peaks_gib(step)
            measured = trainer.peak_gib(step, FAR)
        foretold = peaks[LENGTHS[1]] + _line(peaks)["kib_per_token"] * (FAR - LENGTHS[1]) / 2**20
        found[name] = {"peak_gib": measured, "foretold_gib": round(foretold, 3)}
    return found


def _line(peaks: dict[int, float]) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"left_out": "the steps ran, but peak memory is read on CUDA only"}
    (low, at_low), (high, at_high) = peaks.items()
    slope = (at_high - at_low) / (high - low)
    room = torch.cuda.get_device_properties(0).total_memory / 2**30 * SHARE_OF_DEVICE
    return {
        "kib_per_token": round(slope * 2**20, 3),
        "longest_tokens_by_the_line": int(high + (room - at_high) / slope),
    }
