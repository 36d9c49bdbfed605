"""A call repeated from its recording gives the bits that it gave when it ran as it is.

On a GPU tests/ops/state_on_gpus.py does so through the driver.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")
from seqpar.kernels.recorded_call import RecordedCall
from seqpar.kernels.recorder import Recorder, lasting, not_recorded
from seqpar.traffic import count_traffic
from tests.kernels.recorded_layer import Layer, launch_by_address


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_by_address(monkeypatch)


def _results(call: RecordedCall, seed: int, decay: Tensor | None) -> list[Tensor]:
    torch.manual_seed(seed)
    leaves = [torch.randn(1, 200, 2, 64).requires_grad_() for _ in range(3)]
    do = torch.randn(1, 200, 2, 64)
    o = call(*leaves, decay) if call.is_ready else Layer.apply(call, *leaves, decay)
    return [o.detach(), *torch.autograd.grad(o, leaves, do)]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("decays", [True, False], ids=["fixed", "none"])
def test_the_third_call_repeats_the_second(decays: bool) -> None:
    call = RecordedCall(with_grad=True)
    ready = []
    for seed in range(4):
        decay = -torch.rand(2) if decays else None  # at another address each time
        expected = _results(RecordedCall(with_grad=True), seed, decay)
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
        torch.empty(3).fill_(1.0)
    assert "fill_" in str(recorder.problem)
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
