"""The longest stream that trains: peak memory of a step, AdamW's states included, way by way.

Peaks at two lengths give a line; where it meets 95% of the device is the longest stream. A peak is
the largest of several lines over the number of tokens (moments of a step), none of which begins
below what is held before a step. So far out it rises at least as fast as the line through both
peaks, and at most as fast as the line from what is held to the longer stream's: the longest stream
lies between the two. They agree where nothing of a fixed size was the peak. Steps at the longest
length itself would take minutes: attention is quadratic, memory is not. So one length far out is
run with two of the sixteen layers, and compared with what the line says of it. What tiling and
offloading cost in time is a section of its own (`tiling_time`): memory may be measured beside
other work on the device, time may not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.wrap_peers import deepspeed_ulysses, torch_context_parallel
from benchmarks.wrapped import FAILURES, LLAMA, Machine, recompute_layers
from seqpar.loss import chunked_token_loss
from seqpar.offload import offload_checkpoints
from seqpar.tiles import tile_layers
from seqpar.wrap import parallelize, unparallelize

FIRST = 8192  # the optimizer's states exist after one step
LENGTHS = (65536, 81920)
FAR_LAYERS, FAR_TOKENS = 2, 262144
SHARE_OF_DEVICE = 0.95
Step = Callable[[int], Tensor]


@contextmanager
def wrapped(
    machine: Machine,
    model: nn.Module,
    *,
    strategy: Any,
    layout: str,
    tiled: bool,
    offload: bool = False,
) -> Iterator[Step]:
    """Forward and backward of the wrapped model with the blockwise head."""
    if tiled:
        tile_layers(model)
    if offload:
        offload_checkpoints(model)
    parallelize(model, machine.mesh, strategy=strategy)

    def step(count: int) -> Tensor:
        batch = machine.batch(count, machine.mesh, layout)
        loss = chunked_token_loss(model, batch, implementation="seqpar")
        loss.backward()
        return loss.detach()

    try:
        yield step
    finally:
        unparallelize(model)
        recompute_layers(model)


@contextmanager
def torch_ring(machine: Machine, model: nn.Module) -> Iterator[Step]:
    yield lambda count: torch_context_parallel(machine, model, count)


RING = {"strategy": "ring", "layout": "zigzag"}
ULYSSES = {"strategy": "ulysses", "layout": "contiguous"}
WAYS: dict[str, Callable[[Machine, nn.Module], Any]] = {
    "seqpar_ring_tiled": functools.partial(wrapped, **RING, tiled=True),
    "deepspeed_ulysses_tiled_mlp": functools.partial(deepspeed_ulysses, tiled_mlp=True),
    "seqpar_ulysses_tiled": functools.partial(wrapped, **ULYSSES, tiled=True),
    "torch_context_parallel": torch_ring,
    "seqpar_ring_tiled_offloaded": functools.partial(wrapped, **RING, tiled=True, offload=True),
    "seqpar_ring": functools.partial(wrapped, **RING, tiled=False),
    "deepspeed_ulysses": functools.partial(deepspeed_ulysses, tiled_mlp=False),
    "seqpar_ulysses": functools.partial(wrapped, **ULYSSES, tiled=False),
}
"""In order of worth: a time limit leaves out the last. Torch's holds whole logits, no other way."""
TIMED = ("seqpar_ring", "seqpar_ring_tiled", "seqpar_ring_tiled_offloaded")


class Trainer:
    """A Llama of 1B parameters, its layers recomputed, and AdamW with states in bf16."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.model = machine.model("llama", LLAMA, checkpointed=True)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=machine.cuda)

    def peak_gib(self, step: Step, count: int) -> float:
        """Peak memory of one step, which only CUDA keeps."""
        self.machine.free()
        step(self.machine.tokens(count))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.machine.peak_gib()

    def held_gib(self) -> float:
        self.machine.free()
        return self.machine.peak_gib()


def longest(machine: Machine) -> Iterator[dict[str, Any]]:
    """Peaks and the line through them, for seqpar and its peers; yields after every row."""
    trainer, found = Trainer(machine), dict[str, Any]()
    with WAYS["seqpar_ring_tiled"](machine, trainer.model) as step:
        trainer.peak_gib(step, FIRST)
    found["held_before_a_step_gib"] = trainer.held_gib()
    for name in machine.ways:
        found[name] = machine.left_out() or _row(trainer, name, found["held_before_a_step_gib"])
        yield found
        if name == "seqpar_ring_tiled_offloaded":
            found["far_out"] = machine.left_out() or _far_out(machine, found)
            yield found


def tiling_time(machine: Machine) -> dict[str, Any]:
    """Forward and backward at the longer length: as it is, tiled, tiled and offloaded."""
    model = machine.model("llama", LLAMA, checkpointed=True)
    count = machine.tokens(LENGTHS[-1])
    found: dict[str, Any] = {"tokens": count}
    for name in TIMED:
        with WAYS[name](machine, model) as step:
            found[f"{name}_ms"] = machine.time_ms(model, lambda: step(count), repeats=1)[0]
    return found


def _row(trainer: Trainer, name: str, held_gib: float) -> dict[str, Any]:
    try:
        with WAYS[name](trainer.machine, trainer.model) as step:
            peaks = {count: trainer.peak_gib(step, count) for count in LENGTHS}
            return {"peak_gib": peaks, **_line(peaks, held_gib)}
    except FAILURES as error:
        return {"failed": f"{type(error).__name__}: {error}"[:300]}


def _line(peaks: dict[int, float], held_gib: float) -> dict[str, Any]:
    (low, at_low), (high, at_high) = peaks.items()
    if not torch.cuda.is_available():
        return {"left_out": "the steps ran, but peak memory is read on CUDA only"}
    slope, most = (at_high - at_low) / (high - low), (at_high - held_gib) / high
    room = torch.cuda.get_device_properties(0).total_memory / 2**30 * SHARE_OF_DEVICE - at_high
    return {
        "kib_per_token": round(slope * 2**20, 3),
        "kib_per_token_at_most": round(most * 2**20, 3),
        "gib_at_no_tokens": round(at_high - high * slope, 3),
        "longest_tokens_by_the_line": int(high + room / slope),
        "longest_tokens_at_least": int(high + room / most),
    }


def _far_out(machine: Machine, found: dict[str, Any]) -> dict[str, Any]:
    """Two layers at a length far out, tiled and not offloaded, against the line of sixteen.

    What a layer adds to the line is its checkpoint; what is held at no tokens beyond the
    parameters and AdamW's states is the head's.
    """
    line = found["seqpar_ring_tiled"]
    tokens = machine.tokens(FAR_TOKENS)
    model = machine.model("llama", {**LLAMA, "num_hidden_layers": FAR_LAYERS}, checkpointed=True)
    with ExitStack() as stack:
        step = stack.enter_context(WAYS["seqpar_ring_tiled"](machine, model))
        machine.free()
        held = machine.peak_gib()
        step(tokens)
        peak = machine.peak_gib()
    del model
    if "kib_per_token" not in line:
        return {"left_out": line.get("failed", line.get("left_out"))}
    fewer = LLAMA["num_hidden_layers"] - FAR_LAYERS
    checkpoint_kib = 2 * LLAMA["hidden_size"] / machine.ranks / 1024
    head = line["gib_at_no_tokens"] - found["held_before_a_step_gib"]
    slope = line["kib_per_token"] - fewer * checkpoint_kib
    return {
        "layers": FAR_LAYERS,
        "tokens": tokens,
        "peak_gib": peak,
        "predicted_gib": round(held + head + tokens * slope / 2**20, 3),
    }
