"""The longest stream that trains: peak memory of a step, AdamW's states included, way by way.

Peaks at the longer two of three lengths give a line; where it meets 95% of the device is the
longest stream. The shortest says whether it is a line, or whether something of a fixed size (a
block of logits) was the peak there. Steps at the longest length itself would take minutes each:
attention is quadratic, memory is not.
"""

from __future__ import annotations

import functools
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

FIRST = 8192  # the optimizer's states exist after one step
LENGTHS = (32768, 65536, 131072)
SHARE_OF_DEVICE = 0.95
FAILURES = (RuntimeError, ImportError, ValueError, TypeError, AttributeError, AssertionError)
Step = Callable[[int], Tensor]


@contextmanager
def wrapped(
    machine: Machine, model: nn.Module, *, strategy: Any, layout: str, tiled_mlp: bool
) -> Iterator[Step]:
    """Forward and backward of the wrapped model with the blockwise head."""
    for name, module in model.named_modules() if tiled_mlp else ():
        if name.endswith(".mlp"):
            tile_tokens(module)
    parallelize(model, machine.mesh, strategy=strategy)

    def step(count: int) -> Tensor:
        loss = chunked_token_loss(model, machine.batch(count, machine.mesh, layout))
        loss.backward()
        return loss.detach()

    try:
        yield step
    finally:
        unparallelize(model)


@contextmanager
def torch_ring(machine: Machine, model: nn.Module) -> Iterator[Step]:
    yield lambda count: torch_context_parallel(machine, model, count)


RING = {"strategy": "ring", "layout": "zigzag"}
ULYSSES = {"strategy": "ulysses", "layout": "contiguous"}
WAYS: dict[str, Callable[[Machine, nn.Module], Any]] = {
    "seqpar_ring_tiled_mlp": functools.partial(wrapped, **RING, tiled_mlp=True),
    "seqpar_ulysses_tiled_mlp": functools.partial(wrapped, **ULYSSES, tiled_mlp=True),
    "deepspeed_ulysses_tiled_mlp": functools.partial(deepspeed_ulysses, tiled_mlp=True),
    "seqpar_ring": functools.partial(wrapped, **RING, tiled_mlp=False),
    "seqpar_ulysses": functools.partial(wrapped, **ULYSSES, tiled_mlp=False),
    "deepspeed_ulysses": functools.partial(deepspeed_ulysses, tiled_mlp=False),
    "torch_context_parallel": torch_ring,
}
"""No way but torch's holds whole logits: seqpar's head goes by blocks, DeepSpeed's by slices."""


class Trainer:
    """A Llama of 1B parameters, its layers recomputed, and AdamW with states in bf16."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.model = machine.model("llama", LLAMA, checkpointed=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=machine.cuda)

    def peak_gib(self, step: Step, count: int) -> float | None:
        """Peak memory of one step, which only CUDA keeps."""
        self.machine.free()
        step(self.machine.tokens(count))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.machine.peak_gib() if self.machine.cuda else None


def longest(machine: Machine) -> dict[str, Any]:
    """Peaks and the line through them, for seqpar and its peers."""
    trainer, found = Trainer(machine), dict[str, Any]()
    for name, way in WAYS.items():
        late = machine.left_out()
        if late is not None:
            found[name] = late
            continue
        try:
            with way(machine, trainer.model) as step:
                if not found:
                    trainer.peak_gib(step, FIRST)
                peaks = {count: trainer.peak_gib(step, count) for count in LENGTHS}
            found[name] = {"peak_gib": peaks, **_line(peaks)}
        except FAILURES as error:
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
    return found


def _line(peaks: dict[int, float]) -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"left_out": "the steps ran, but peak memory is read on CUDA only"}
    (low, at_low), (high, at_high) = list(peaks.items())[1:]
    slope = (at_high - at_low) / (high - low)
    room = torch.cuda.get_device_properties(0).total_memory / 2**30 * SHARE_OF_DEVICE
    return {
        "kib_per_token": round(slope * 2**20, 3),
        "longest_tokens_by_the_line": int(high + (room - at_high) / slope),
    }
