"""A layer whose launches read the addresses of their tensors where a driver would, on the CPU.

On a GPU a recorded call is repeated through the driver. Here kernels are interpreted, and a launch
runs on what lies at the addresses that it reads.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning.function import (
    attend,
    attend_backward,
    key_value_summary,
    query_grad_summary,
)
from seqpar.kernels.lightning.plan import Plan, dense
from seqpar.kernels.recorded_call import RecordedCall
from seqpar.ops.state_saved import put_tensors, take_tensors
from seqpar.traffic import count

__all__ = ["Layer", "launch_by_address"]


class AddressedLaunch:
    """A launch that knows its tensors by what is written at some cells of memory."""

    def __init__(self, launch: Launch, tensors: tuple[Tensor, ...]) -> None:
        self.owner, self.maps, self.function, self.stream = launch, [], 1, 0
        self.addresses = list(range(len(tensors)))
        self._forms = [(tuple(x.shape), x.stride(), x.dtype) for x in tensors]

    def parameters(self, map_cells: list[int], address_cells: list[int]) -> list[int]:
        return address_cells

    def new_config(self) -> Any:
        return ctypes.create_string_buffer(64)

    def launch(self, config: int, function: int, cells: list[int], extra: None) -> int:
        tensors = []
        for cell, (shape, strides, dtype) in zip(cells, self._forms, strict=True):
            address = ctypes.c_uint64.from_address(cell).value
            count = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
            memory = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
            tensors.append(torch.frombuffer(memory, dtype=dtype).as_strided(shape, strides))
        self.owner.through_triton(*tensors)
        return 0


def launch_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton on the CPU, launched by addresses."""
    if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported, and no GPU")
    made, run = Plan.__init__, Launch._run

    def on_triton(self: Plan, problem: Any) -> None:
        made(self, problem)
        self.on_triton = True

    def bound(self: Launch, *tensors: Tensor) -> None:
        run(self, *tensors)
        self._direct = None
        self.by_address = AddressedLaunch(self, tensors)

    monkeypatch.setattr(Plan, "__init__", on_triton)
    monkeypatch.setattr(Launch, "_run", bound)
    monkeypatch.setattr(Launch, "direct", property(lambda self: self.by_address))


class Layer(torch.autograd.Function):
    """What a rank computes, its own state entering it, as the general path calls the kernels."""

    @staticmethod
    def forward(ctx: Any, call: RecordedCall, *given: Tensor | None) -> Tensor:
        q, k, v, decay = given
        recorder = call.recorder(given)
        with recorder or nullcontext():
            count("all_gather", 3, 5)
            summary = key_value_summary(k, v, log_decay=decay)
            o = attend(q, k, v, summary, log_decay=decay, entry_state=summary.final_state)
        saved = [q, k, v]
        ctx.summary = take_tensors(summary, saved)
        ctx.decay = take_tensors(decay, saved)
        ctx.save_for_backward(*saved)
        ctx.call = call
        ctx.trace = call.forward_ended(recorder, [o], saved)
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        saved = ctx.saved_tensors
        (q, k, v), decay = saved[:3], put_tensors(ctx.decay, saved)
        summary = put_tensors(ctx.summary, saved)
        do = dense(do)
        recorder = None if ctx.trace is None else ctx.call.backward_recorder(saved, do)
        with recorder or nullcontext():
            grad_summary = query_grad_summary(q, do, log_decay=decay)
            *grads, _ = attend_backward(
                q, k, v, do, summary, grad_summary, log_decay=decay,
                entry_state=summary.final_state, exit_state_grad=grad_summary.final_state,
            )  # fmt: skip
        ctx.call.backward_ended(ctx.trace, recorder, [*grads, None])
        return None, *grads, None
