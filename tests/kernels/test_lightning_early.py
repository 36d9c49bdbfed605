"""Output passes that fetch their first chunks before they wait for the launches before."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from seqpar.kernels.lightning import lightning_attention

pytest.importorskip("triton", reason="Triton is not installed")

SHAPE = (1, 8192, 32, 128)


def test_only_a_forward_whose_own_state_pass_comes_just_before_fetches_early() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.early_launches"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[0])
    assert found.pop("cut") == [True]
    assert all(passes and not any(passes) for passes in found.values()), found


def decays(kind: str) -> Tensor | None:
    if kind == "none":
        return None
    if kind == "fixed":
        return -(2.0 ** (-8.0 * torch.arange(1, SHAPE[2] + 1, device="cuda") / SHAPE[2]))
    return -0.06 * torch.rand(SHAPE[:3], device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "fixed", "token"])
@torch.no_grad()
def test_what_the_launches_just_before_wrote_is_what_is_read(kind: str) -> None:
    """Inputs are copied into place just before a call; outputs are the next call's values."""
    torch.manual_seed(0)
    given = [[torch.randn(SHAPE, device="cuda").bfloat16() for _ in range(3)] for _ in range(2)]
    log_decay = decays(kind)

    def chain(q: Tensor, k: Tensor, v: Tensor, *, alone: bool) -> list[Tensor]:
        outputs = []
        for _ in range(3):
            v, _ = lightning_attention(q, k, v, log_decay=log_decay)
            outputs.append(v)
            if alone:
                torch.cuda.synchronize()
        return outputs

    expected = [chain(*inputs, alone=True) for inputs in given]
    room = [torch.empty_like(x) for x in given[0]]
    side = torch.cuda.Stream()
    for attempt in range(24):
        stream = side if attempt % 3 == 2 else torch.cuda.current_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for place, x in zip(room, given[attempt % 2], strict=True):
                place.copy_(x)
            outputs = chain(*room, alone=False)
        torch.cuda.current_stream().wait_stream(stream)
        for now, before in zip(outputs, expected[attempt % 2], strict=True):
            assert torch.equal(now, before)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["none", "fixed", "token"])
@torch.no_grad()
def test_early_fetches_can_be_captured(kind: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(SHAPE, device="cuda").bfloat16() for _ in range(3))
    log_decay = decays(kind)
    expected, _ = lightning_attention(q, k, v, log_decay=log_decay)
    expected, _ = lightning_attention(q, k, expected, log_decay=log_decay)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o, _ = lightning_attention(q, k, v, log_decay=log_decay)
        o, _ = lightning_attention(q, k, o, log_decay=log_decay)
    for _ in range(10):
        o.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(o, expected)
