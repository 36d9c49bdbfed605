"""A call repeated from its recording gives the bits that it gave when it ran as it is.

On a GPU tests/ops/state_on_gpus.py does so through the driver. Here, where kernels are interpreted,
a launch reads the addresses of its tensors where a driver would, and runs on what lies there.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning.function import (
    attend,
    attend_backward,
    key_value_summary,
    query_grad_summary,
)
from seqpar.kernels.lightning.plan import Plan
from seqpar.kernels.recorded_call import RecordedCall
from seqpar.kernels.recorder import Recorder, lasting, not_recorded
from seqpar.ops.state_saved import put_tensors, take_tensors
from seqpar.traffic import count, count_traffic


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


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
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
        ctx.save_for_backward(*saved)
        ctx.call, ctx.decay = call, decay
        ctx.trace = call.forward_ended(recorder, [o], [*saved, decay])
        return o

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> Any:
        saved = ctx.saved_tensors
        q, k, v = saved[:3]
        summary = put_tensors(ctx.summary, saved)
        recorder = None if ctx.trace is None else Recorder([*saved, ctx.decay, do])
        with recorder or nullcontext():
            grad_summary = query_grad_summary(q, do, log_decay=ctx.decay)
            *grads, _ = attend_backward(
                q, k, v, do, summary, grad_summary, log_decay=ctx.decay,
                entry_state=summary.final_state, exit_state_grad=grad_summary.final_state,
            )  # fmt: skip
        ctx.call.backward_ended(ctx.trace, recorder, [*grads, None])
        return None, *grads, None


def _results(call: RecordedCall, seed: int, decay: Tensor | None) -> list[Tensor]:
    torch.manual_seed(seed)
    leaves = [torch.randn(1, 200, 2, 64).requires_grad_() for _ in range(3)]
    do = torch.randn(1, 200, 2, 64)
    o = call(*leaves, decay) if call.is_ready else Layer.apply(call, *leaves, decay)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("decays", [True, False], ids=["fixed", "none"])
def test_the_third_call_repeats_the_second(decays: bool) -> None:
    call = RecordedCall(with_grad=True, num_inputs=4)
    ready = []
    for seed in range(4):
        decay = -torch.rand(2) if decays else None  # at another address each time
        expected = _results(RecordedCall(with_grad=True, num_inputs=4), seed, decay)
        ready.append(call.is_ready)
        with count_traffic() as traffic:
            found = _results(call, seed, decay)
        assert traffic["all_gather"].received_bytes == 5
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y)
    assert ready == [False, False, True, True]


def test_what_is_neither_launch_nor_view_is_not_repeated() -> None:
    given, table = torch.randn(8), lasting(torch.randn(8))
    with Recorder([given]) as recorder:
        made = torch.empty_like(given)[2:].view(3, 2).detach()
        recorder.do(lambda *tensors: None, made, given, table)
    assert recorder.problem is None
    assert [place.source for place in recorder.steps[0].places] == ["made", "given", "constant"]
    assert recorder.steps[0].places[0].offset == 8
    with Recorder([given]) as recorder:
        given + 1
    assert "aten.add" in str(recorder.problem)
    with Recorder([given]) as recorder:
        torch.empty(3).zero_()
    assert "zero_" in str(recorder.problem)
    with Recorder([given]) as recorder:
        given[0].item()  # gives no tensor, as the messages of a process group do
    assert "_local_scalar_dense" in str(recorder.problem)
    with Recorder([given]) as recorder:
        not_recorded("a launch of its own")
    assert recorder.problem == "a launch of its own"


def test_a_tensor_from_elsewhere_is_not_taken_for_a_table() -> None:
    given, other = torch.randn(8), torch.randn(8)
    with Recorder([given]) as recorder:
        recorder.do(lambda *tensors: None, given, other)
    assert "neither handed to the call nor made by it" in str(recorder.problem)
