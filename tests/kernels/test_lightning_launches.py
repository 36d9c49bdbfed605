"""Launches of the compiled kernels: captured, past Triton, overlapping, first in a thread."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning import lightning_attention
from tests.kernels.test_lightning import DECAYS
from tests.kernels.test_lightning_triton import (
    outputs_and_gradients,
    plan_for,
    public_case,
)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("value_dim", [64, 128])
def test_a_call_can_be_captured_in_a_cuda_graph(decay: str, value_dim: int) -> None:
    ours = public_case(decay, value_dim)
    expected = outputs_and_gradients(ours)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        outputs_and_gradients(ours)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = outputs_and_gradients(ours)
    for x in captured:
        x.fill_(torch.nan)
    graph.replay()
    for now, before in zip(captured, expected, strict=True):
        assert torch.equal(now, before)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("value_dim", [64, 128])
def test_launches_past_triton_give_what_its_own_give(
    decay: str, value_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = public_case(decay, value_dim)
    outputs_and_gradients(ours)
    direct = outputs_and_gradients(ours)
    monkeypatch.setattr(Launch, "_bind", lambda *_: None)
    monkeypatch.setattr(Launch, "__call__", Launch.through_triton)
    for one, other in zip(direct, outputs_and_gradients(ours), strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("moved", [False, True])
def test_a_launch_can_be_the_first_call_of_cuda_in_its_thread(moved: bool) -> None:
    inputs = {n: x if x is None else x.detach() for n, x in public_case("fixed").items()}
    expected, _ = lightning_attention(**inputs)
    lightning_attention(**inputs)  # past Triton
    if moved:  # tensors whose maps are not known yet
        inputs |= {name: torch.stack([inputs[name]] * 2)[1] for name in "qkv"}
        torch.cuda.synchronize()
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(lightning_attention(**inputs)[0]))
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert torch.equal(found[0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("value_dim", [64, 128])
def test_launches_that_overlap_wait_for_what_they_read(decay: str, value_dim: int) -> None:
    ours = public_case(decay, value_dim)
    expected = outputs_and_gradients(ours)
    side = torch.cuda.Stream()
    for attempt in range(24):
        poisoned = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(12, 23)]
        del poisoned  # what the next call is given, if it reads too early
        stream = side if attempt % 3 == 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            again = outputs_and_gradients(ours)
        torch.cuda.current_stream().wait_stream(stream)
        for now, before in zip(again, expected, strict=True):
            assert torch.equal(now, before)


@pytest.mark.gpu
def test_launches_bind_to_the_compiled_kernels() -> None:
    plan = plan_for(public_case("fixed"))
    outputs_and_gradients(public_case("fixed"))
    assert plan.cut.launches
    assert all(launch.direct for launch in plan.cut.launches.values())
