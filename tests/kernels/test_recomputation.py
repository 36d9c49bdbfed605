"""A call may be repeated forward and run as it is when recomputed, or the other way round.

Activation checkpointing hands what the second forward pass saves to the backward pass of the first,
one tensor after the other. On a GPU tests/ops/state_on_gpus.py does the same to the operator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

pytest.importorskip("triton", reason="Triton is not installed")
from seqpar.kernels.recorded_call import RecordedCall
from seqpar.layout import SequenceLayout
from seqpar.ops import state
from tests.kernels.recorded_layer import Layer, launch_by_address

TOKENS, HEADS, DIM = 70, 2, 32
LAYOUT = SequenceLayout.contiguous((0, TOKENS), 1)
DECAYS = [-torch.tensor([0.1, 0.4]), None]


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    launch_by_address(monkeypatch)


def _kernels(call: RecordedCall, *given: Tensor | None) -> Tensor:
    """A state enters, which is a tensor of its own."""
    return Layer.apply(call, *given)  # type: ignore[no-any-return, no-untyped-call]


def _operator(call: RecordedCall, q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    """`state_attention` of one rank, which records on CUDA devices alone."""
    mixer, inputs = state._lightning(q, k, v, decay, True)
    options = (None, (None, False), "all_gather", False, None, False)
    plan = state._plan(mixer, inputs, LAYOUT, *options)
    return state._scatter(mixer, inputs, plan, None, None, False, call)[0]


class Layers:
    """A layer by one call, which may be another one each time."""

    def __init__(
        self, call: RecordedCall, decay: Tensor | None, layer: Callable[..., Tensor] = _kernels
    ) -> None:
        self.call, self.decay, self._layer = call, decay, layer
        self.repeated: list[bool] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        self.repeated.append(self.call.is_ready)
        if self.call.is_ready:
            return self.call(*inputs, self.decay)
        return self._layer(self.call, *inputs, self.decay)

    def recomputed(self, *inputs: Tensor) -> Tensor:
        return checkpoint(self, *inputs, use_reentrant=False)  # type: ignore[no-any-return]


def _leaves(seed: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v, do = (torch.randn(1, TOKENS, HEADS, DIM, generator=generator) for _ in range(4))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_()], do


def _expected(seed: int, decay: Tensor | None, *layer: Any) -> list[Tensor]:
    """As it is, nothing recomputed."""
    leaves, do = _leaves(seed)
    o = Layers(RecordedCall(with_grad=True), decay, *layer)(*leaves)
    return [o, *torch.autograd.grad(o, leaves, do)]


def _make_ready(call: RecordedCall, decay: Tensor | None, *layer: Any) -> RecordedCall:
    for seed in (7, 8):
        leaves, do = _leaves(seed)
        torch.autograd.grad(Layers(call, decay, *layer)(*leaves), leaves, do)
    assert call.is_ready
    return call


def _ready(decay: Tensor | None, *layer: Any) -> RecordedCall:
    return _make_ready(RecordedCall(with_grad=True), decay, *layer)


def _assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("layer", [_kernels, _operator])
@pytest.mark.parametrize("decay", DECAYS, ids=["fixed", "none"])
def test_both_ways_save_the_same_tensors(
    decay: Tensor | None, layer: Callable[..., Tensor]
) -> None:
    saved: list[list[Tensor]] = []
    leaves, _ = _leaves(1)
    for call in (RecordedCall(with_grad=True), _ready(decay, layer)):
        saved.append([])
        with saved_tensors_hooks(lambda x: (saved[-1].append(x), x)[1], lambda x: x):
            Layers(call, decay, layer)(*leaves)
    as_it_is, repeated = saved
    assert len(as_it_is) == len(repeated) > len(leaves)
    for x, y in zip(as_it_is, repeated, strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)
        # A state that nobody takes is memory as it was found, filled with NaN.
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
    addresses = [x.data_ptr() for x in repeated]
    assert len(set(addresses)) == len(addresses), "no tensor is saved twice"


def _layers(first_repeated: bool, decay: Tensor | None, *layer: Any) -> Layers:
    call = _ready(decay, *layer) if first_repeated else RecordedCall(with_grad=True)
    return Layers(call, decay, *layer)


def _other_way(layers: Layers, *layer: Any) -> None:
    """What was repeated runs as it is, and what did not is repeated."""
    if layers.call.is_ready:
        layers.call = RecordedCall(with_grad=True)
    else:
        _make_ready(layers.call, layers.decay, *layer)


@pytest.mark.parametrize(("layer", "early_stop"), [(_kernels, False), (_operator, True)])
@pytest.mark.parametrize("first_repeated", [True, False], ids=["repeated first", "as it is first"])
@pytest.mark.parametrize("decay", DECAYS, ids=["fixed", "none"])
def test_recomputed_the_other_way(
    decay: Tensor | None, first_repeated: bool, layer: Callable[..., Tensor], early_stop: bool
) -> None:
    """Two micro-batches forward before either runs backward, the first one's twice."""
    layers = _layers(first_repeated, decay, layer)
    with set_checkpoint_early_stop(early_stop):
        batches = {seed: _leaves(seed) for seed in (1, 2)}
        outputs = {seed: layers.recomputed(*leaves) for seed, (leaves, _) in batches.items()}
        _other_way(layers, layer)
        for seed in (1, 2, 1):
            leaves, do = batches[seed]
            grads = torch.autograd.grad(outputs[seed], leaves, do, retain_graph=True)
            _assert_equal([outputs[seed], *grads], _expected(seed, decay, layer))
    assert layers.repeated[:3] == [first_repeated, first_repeated, not first_repeated]


@pytest.mark.parametrize("first_repeated", [True, False], ids=["repeated first", "as it is first"])
def test_a_checkpoint_in_a_checkpoint(first_repeated: bool) -> None:
    decay = DECAYS[0]
    layers = _layers(first_repeated, decay)

    def two(q: Tensor, k: Tensor, v: Tensor, run: Callable[..., Tensor]) -> Tensor:
        return run(run(q, k, v), k, v)

    leaves, do = _leaves(1)
    o = checkpoint(two, *leaves, layers.recomputed, use_reentrant=False)
    _other_way(layers)
    grads = torch.autograd.grad(o, leaves, do)
    plain = two(*leaves, Layers(RecordedCall(with_grad=True), decay))
    _assert_equal([o, *grads], [plain, *torch.autograd.grad(plain, leaves, do)])
    forward, again = layers.repeated[:2], layers.repeated[2:]
    assert set(forward) == {first_repeated}
    assert set(again) == {not first_repeated}


@pytest.mark.parametrize("decay", DECAYS, ids=["fixed", "none"])
def test_saved_tensors_that_come_back_elsewhere_and_dense(decay: Tensor | None) -> None:
    """Inputs are parts of one tensor: what a hook hands back has not their strides."""
    call = RecordedCall(with_grad=True)
    for turn in range(4):
        leaves, do = _leaves(turn)
        whole = torch.stack([x.detach() for x in leaves], 2).requires_grad_()
        parts = whole.unbind(2)
        assert not parts[0].is_contiguous()
        ready = call.is_ready
        if turn == 2:
            o = Layers(call, decay)(*parts)
        else:
            with save_on_cpu():
                o = Layers(call, decay)(*parts)
        (grad,) = torch.autograd.grad(o, whole, do)
        _assert_equal([o, *grad.unbind(2)], _expected(turn, decay))
    assert ready


def test_a_gradient_that_is_an_input_is_not_taken_for_it() -> None:
    call = RecordedCall(with_grad=True)
    for turn in range(5):
        leaves, do = _leaves(turn)
        layers = Layers(call, None)
        if turn < 3:
            torch.autograd.grad(layers(*leaves), leaves, leaves[2].detach())
            assert not call.is_ready
            continue
        o = layers(*leaves)
        _assert_equal([o, *torch.autograd.grad(o, leaves, do)], _expected(turn, None))
    assert call.is_ready


def test_a_gradient_in_other_strides_and_at_other_addresses() -> None:
    call = _ready(None)
    leaves, do = _leaves(1)
    shifted = torch.empty(do.numel() + 1)[1:].view(do.shape).copy_(do)
    assert shifted.data_ptr() % 16
    for grad in (do.transpose(1, 2).contiguous().transpose(1, 2), shifted):
        o = Layers(call, None)(*leaves)
        _assert_equal([o, *torch.autograd.grad(o, leaves, grad)], _expected(1, None))
