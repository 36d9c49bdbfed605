"""Launches that begin before the launches before them have ended, and wait later than first."""

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


def test_launches_wait_no_later_than_their_inputs_allow() -> None:
    """In the order of the launches. "cut": a few segments a sequence; "deep": more than 16.

    "learned": backward with the decays' gradient. dk's pass then reads what dq's pass sums and the
    states that it leaves, so dv, which lets it in, may not begin beside dq's.
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.early_launches"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    states, enter, output = "segment_states: ", "enter_segments: ", "output_pass_groups: "
    first, for_states, last = "first", "for states", "last"
    of_dq, of_dv, of_dk = output + first, output + first, output + last
    sums = "output_pass_sums: "
    assert json.loads(done.stdout.splitlines()[0]) == {
        "cut": [states + first, output + for_states],
        "cut, backward": [of_dq, states + last, output + for_states, of_dk],
        "cut, learned": [sums + first, states + last, output + for_states, sums + last],
        "cut, attend": [states + first, enter + first, output + first],
        "whole": [output + first],
        "whole, backward": [of_dq, output + last, of_dk],
        "whole, learned": [sums + first, output + for_states, sums + last],
        "whole, attend": [states + first, output + first],
        "deep": [states + first, enter + first, output + first],
        "deep, backward": [enter + first, of_dq, states + last, enter + first, of_dv, of_dk],
        "deep, learned": [
            *(enter + first, sums + first, states + last),
            *(enter + first, of_dv, sums + last),
        ],
        "deep, attend": [states + first, enter + first, enter + first, output + first],
    }


def decays(kind: str, shape: tuple[int, ...] = SHAPE) -> Tensor | None:
    heads = shape[2]
    if kind == "none":
        return None
    if kind == "fixed":
        return -(2.0 ** (-8.0 * torch.arange(1, heads + 1, device="cuda") / heads))
    return -0.06 * torch.rand(shape[:3], device="cuda")


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
@pytest.mark.parametrize("shape", [SHAPE, (4, 2048, 64, 128), (1, 65536, 4, 128)])
@pytest.mark.parametrize("kind", ["none", "fixed", "token"])
def test_gradients_are_those_of_launches_one_after_another(
    kind: str, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients are the next call's inputs; each is copied into place just before."""
    from seqpar.kernels.lightning import decay_gradient, launch_output, plan, state_pass

    torch.manual_seed(0)
    given = [[torch.randn(shape, device="cuda").bfloat16() for _ in range(4)] for _ in range(2)]
    log_decay = decays(kind, shape)
    learned = [] if kind != "token" else [log_decay.requires_grad_()]

    def chain(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> list[Tensor]:
        found = []
        for _ in range(3):
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            o, _ = lightning_attention(*inputs, log_decay=log_decay)
            q, k, v, *rest = torch.autograd.grad(o, [*inputs, *learned], do)
            found += [q, k, v, *rest]
        return found

    with monkeypatch.context() as patch:
        for module in (launch_output, state_pass, decay_gradient):
            patch.setattr(module, "can_overlap", lambda device: False)
        for plans in (plan._checked, plan._plan):  # with the launches that are kept
            plans.cache_clear()
        expected = [chain(*inputs) for inputs in given]
    for plans in (plan._checked, plan._plan):
        plans.cache_clear()
    room = [torch.empty_like(x) for x in given[0]]
    for attempt in range(12):
        for place, x in zip(room, given[attempt % 2], strict=True):
            place.copy_(x)
        found = chain(*room)
        for now, before in zip(found, expected[attempt % 2], strict=True):
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
