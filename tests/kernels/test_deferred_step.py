"""Decoding states whose writes wait, against the float64 recurrence: on the CPU, where every step
writes, and in Triton, interpreted or on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from seqpar.kernels.lightning import DecodingState, lightning_attention
from seqpar.kernels.lightning.reference import recurrent_attention
from tests.kernels.test_lightning import DECAYS, make_inputs
from tests.tolerances import assert_close

Inputs = dict[str, Tensor | None]


@pytest.fixture(params=["chunked", "triton"])
def device(request: pytest.FixtureRequest) -> str:
    """Where a step runs in PyTorch, and where in Triton."""
    if request.param == "chunked":
        return "cpu"
    pytest.importorskip("triton", reason="Triton is not installed")
    found: str = request.getfixturevalue("triton_device")
    return found


def part(inputs: Inputs, start: int, stop: int, device: str) -> Inputs:
    """q, k, v and log_decay of some tokens."""
    found: Inputs = {}
    for name in ("q", "k", "v", "log_decay"):
        x = inputs[name]
        cut = x is not None and x.ndim > 1
        found[name] = x[:, start:stop].to(device) if cut else x if x is None else x.to(device)
    return found


def check(inputs: Inputs, lengths: Sequence[int], device: str, *, pending: int | None = 4) -> None:
    """Steps of these many tokens, and the state after each tenth, against float64."""
    dtype = inputs["q"].dtype
    expected, _ = recurrent_attention(**inputs)
    kept = inputs["initial_state"].to(device)
    before = kept.clone()
    state = DecodingState(kept, dtype=dtype, pending=pending)
    found, at = [], 0
    for index, tokens in enumerate(lengths):
        found.append(state.step(**part(inputs, at, at + tokens, device)))
        at += tokens
        if index % 10 == 9 or at == expected.shape[1]:
            so_far = {**part(inputs, 0, at, "cpu"), "initial_state": inputs["initial_state"]}
            _, final = recurrent_attention(**so_far)
            assert_close(state.state(), final, what=f"state after {at}", dtype=dtype, dim=0)
    assert at == expected.shape[1]
    assert_close(torch.cat(found, 1), expected, what="o", dtype=dtype)
    assert torch.equal(kept, before)


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("pending", [1, 2, 8])
def test_one_token_at_a_time_through_many_folds(decay: str, pending: int, device: str) -> None:
    inputs = make_inputs(decay=decay, tokens=21, dtype=torch.float32)
    check(inputs, [1] * 21, device, pending=pending)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_tokens_of_half_precision_and_none_at_all(dtype: torch.dtype, device: str) -> None:
    inputs = make_inputs(decay="token", tokens=13, dtype=dtype)
    check(inputs, [1, 0, 1, 1, *[1] * 10], device)


@pytest.mark.parametrize("decay", DECAYS)
def test_a_few_tokens_between_single_ones(decay: str, device: str) -> None:
    lengths = [1, 1, 3, 1, 1, 1, 1, 1, 2, 1, 4, 2, 1]
    inputs = make_inputs(decay=decay, tokens=sum(lengths), dtype=torch.float32)
    check(inputs, lengths, device)


@pytest.mark.parametrize("dims", [(18, 35), (64, 65), (1, 1), (256, 40)])
def test_head_dims_that_no_tile_fits(dims: tuple[int, int], device: str) -> None:
    inputs = make_inputs(
        decay="fixed", tokens=9, heads=2, key_dim=dims[0], value_dim=dims[1], dtype=torch.float32
    )
    check(inputs, [1] * 9, device)


@pytest.mark.parametrize("tile", [(16, 2), (32, 4), (64, 4)], ids=str)
@pytest.mark.parametrize("pending", [1, 16])
def test_programs_of_every_width(
    tile: tuple[int, int], pending: int, triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which one runs depends on how many states there are."""
    from seqpar.kernels.lightning import deferred_step

    monkeypatch.setattr(deferred_step, "_tile", lambda *_: tile)
    inputs = make_inputs(decay="token", tokens=6, heads=2, value_dim=65, dtype=torch.float32)
    check(inputs, [1] * 6, triton_device, pending=pending)


@pytest.mark.parametrize("decay", ["fixed", "token"])
def test_resets_and_decays_that_underflow(decay: str, device: str) -> None:
    inputs = make_inputs(decay=decay, tokens=14, dtype=torch.float32)
    log_decay = inputs["log_decay"]
    log_decay[..., 0], log_decay[..., 1] = -float("inf"), -3e4
    if decay == "token":
        log_decay[:, 1::3, :2] = -0.3
        log_decay[:, 3] = 0.0
    check(inputs, [1] * 14, device)


def test_steps_may_differ_in_their_decays(device: str) -> None:
    """None, then per head, then per token, within one round of pending tokens."""
    inputs = make_inputs(decay="token", tokens=15, dtype=torch.float32)
    heads = torch.tensor([-0.5, 0.0, -0.1])
    inputs["log_decay"][:, 0::3] = 0.0
    inputs["log_decay"][:, 1::3] = heads
    expected, final = recurrent_attention(**inputs)
    state = DecodingState(inputs["initial_state"].to(device), dtype=torch.float32, pending=8)
    found = []
    for t in range(15):
        token = part(inputs, t, t + 1, device)
        if t % 3 < 2:
            token["log_decay"] = heads.to(device) if t % 3 else None
        found.append(state.step(**token))
    assert_close(torch.cat(found, 1), expected, what="o")
    assert_close(state.state(), final, what="state", dim=0)


def test_it_goes_on_from_a_prefill_in_any_layout(device: str) -> None:
    """Heads before tokens, as models cut them; asking for the state changes nothing after."""
    inputs = make_inputs(decay="fixed", tokens=20, dtype=torch.float32)
    whole, final = lightning_attention(**inputs, return_final_state=True)
    _, entry = lightning_attention(
        **part(inputs, 0, 11, "cpu"), initial_state=inputs["initial_state"], return_final_state=True
    )
    states = [DecodingState(entry.to(device), dtype=torch.float32, pending=4) for _ in range(2)]
    for t in range(11, 20):
        token = part(inputs, t, t + 1, device)
        for name in "qkv":
            token[name] = token[name].transpose(1, 2).contiguous().transpose(1, 2)
        one, other = (state.step(**token) for state in states)
        states[1].state().zero_()
        assert_close(one, whole[:, t : t + 1], what="o")
        assert_close(other, one, what="o of the other")
    assert_close(states[0].state(), final, what="state", dim=0)


def test_states_write_in_turn(triton_device: str) -> None:
    """Every step of 8 pending tokens folds one state of eight, and every state once in 8 steps."""
    inputs = make_inputs(decay="none", batch=2, heads=4, tokens=8, dtype=torch.float32)
    state = DecodingState(inputs["initial_state"].to(triton_device), dtype=torch.float32, pending=8)
    kept = state._kept._state
    written = torch.zeros(8, dtype=torch.int64)
    for t in range(8):
        before = kept.clone()
        state.step(**part(inputs, t, t + 1, triton_device))
        changed = (kept != before).flatten(0, 1).flatten(1).any(1).cpu()
        assert changed.sum() == 1
        written += changed
    assert written.tolist() == [1] * 8


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (256, 256), (96, 80), (20, 128)])
def test_bfloat16_at_real_sizes(decay: str, batch: int, dims: tuple[int, int]) -> None:
    inputs = make_inputs(
        decay=decay, batch=batch, tokens=24, heads=33, key_dim=dims[0], value_dim=dims[1],
        dtype=torch.bfloat16,
    )  # fmt: skip
    check(inputs, [1] * 12 + [2] + [1] * 10, "cuda", pending=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dims", [(128, 128), (64, 96)])
def test_a_thousand_states(dims: tuple[int, int]) -> None:
    inputs = make_inputs(
        decay="fixed", batch=16, tokens=10, heads=64, key_dim=dims[0], value_dim=dims[1],
        dtype=torch.bfloat16,
    )  # fmt: skip
    check(inputs, [1] * 10, "cuda", pending=None)


@pytest.mark.gpu
@pytest.mark.parametrize("decay", DECAYS)
def test_replays_of_one_graph(decay: str) -> None:
    """Thirty tokens through a graph of one step, a few outside it, and a graph of the state."""
    tokens = 30
    inputs = make_inputs(
        decay=decay, batch=3, tokens=tokens, heads=50, key_dim=128, value_dim=128,
        dtype=torch.bfloat16,
    )  # fmt: skip
    expected, final = recurrent_attention(**inputs)
    state = DecodingState(inputs["initial_state"].cuda(), dtype=torch.bfloat16)
    token = part(inputs, 0, 1, "cuda")
    found = [state.step(**token)]
    state.state()
    graph, graph_of_state = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = state.step(**token)
    with torch.cuda.graph(graph_of_state):
        current = state.state()
    for t in range(1, tokens):
        now = part(inputs, t, t + 1, "cuda")
        if t % 11 == 0:
            found.append(state.step(**now))
            continue
        for name, x in now.items():
            if x is not None:
                token[name].copy_(x)
        graph.replay()
        found.append(o.clone())
    graph_of_state.replay()
    assert_close(torch.cat(found, 1), expected, what="o", dtype=torch.bfloat16)
    assert_close(current, final, what="state", dtype=torch.bfloat16, dim=0)
    assert torch.equal(current, state.state())
