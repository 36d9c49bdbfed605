"""Checkpoints in host memory: the same numbers to the last bit, and room on the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqpar import offload
from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import Batch, shard
from seqpar.errors import UnsupportedModelError
from seqpar.loss import chunked_token_loss
from seqpar.offload import offload_checkpoints, offloaded
from seqpar.wrap import parallelize
from tests.recompute import keep_activations, recompute_layers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RECOMPUTED = {"use_reentrant": False}


def _model() -> Any:
    model: Any = tiny_model("llama").to(DEVICE)
    recompute_layers(model)
    return parallelize(model.train(), None)


def _gradients(model: Any, batches: list[Batch]) -> list[Tensor]:
    """All forwards before all backwards, the first one's first."""
    model.zero_grad()
    for loss in [chunked_token_loss(model, batch) for batch in batches]:
        loss.backward()
    return [p.grad.clone() for p in model.parameters()]


def _watched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    taken: list[Any] = []
    take = offload._Parked.take
    monkeypatch.setattr(offload._Parked, "take", lambda self: (taken.append(self), take(self))[1])
    return taken


def test_gradients_are_the_same_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forwards before two backwards too; pieces smaller than a tensor."""
    monkeypatch.setattr(offload, "_PIECE_BYTES", 1000)
    model = _model()
    batches = [shard(tiny_stream(model, n), None, device=DEVICE) for n in ((13, 1, 29), (5, 40))]
    expected = _gradients(model, batches)
    taken = _watched(monkeypatch)
    offload_checkpoints(model, least_bytes=1)
    ours = _gradients(model, batches)
    assert len(taken) == 2 * model.config.num_hidden_layers
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    copied = copy.deepcopy(model)
    assert all(
        torch.equal(a, b) for a, b in zip(_gradients(copied, batches), expected, strict=True)
    )


def test_the_input_of_the_layer_before_sets_out_early(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = _watched(monkeypatch)
    recompute = offloaded(checkpoint, least_bytes=1)
    layers = [nn.Linear(4, 4).to(DEVICE) for _ in range(3)]
    hidden = torch.randn(2, 4, device=DEVICE, requires_grad=True)
    for layer in layers:
        hidden = recompute(layer, hidden, **RECOMPUTED)
    fetched = []
    fetch = offload._Parked.fetch
    monkeypatch.setattr(
        offload._Parked, "fetch", lambda self: (fetched.append(self), fetch(self))[1]
    )
    hidden.sum().backward()
    third, second, first = taken
    assert fetched == [third, second, second, first, first]


def test_small_inputs_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = _watched(monkeypatch)
    hidden = torch.randn(2, 4, requires_grad=True)
    offloaded(checkpoint)(nn.Linear(4, 4), hidden, **RECOMPUTED).sum().backward()
    assert not taken


def test_disabling_checkpointing_undoes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = _watched(monkeypatch)
    model = offload_checkpoints(_model(), least_bytes=1)
    batch = [shard(tiny_stream(model, (13, 9)), None, device=DEVICE)]
    keep_activations(model)
    _gradients(model, batch)
    recompute_layers(model)
    _gradients(model, batch)
    assert not taken


def test_models_that_recompute_nothing_are_refused() -> None:
    model: Any = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="none of its layers is recomputed"):
        offload_checkpoints(model)
    recompute_layers(model, use_reentrant=True)
    with pytest.raises(UnsupportedModelError, match="reentrant"):
        offload_checkpoints(model)


@pytest.mark.gpu
def test_inputs_leave_the_device() -> None:
    """A stack of layers holds two inputs, not all; and no kernel waits where it need not."""
    layers = [nn.Linear(64, 64, device="cuda") for _ in range(8)]
    x = torch.randn(1 << 16, 64, device="cuda", requires_grad=True)

    def peak(recompute: Any) -> tuple[int, Tensor]:
        x.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hidden = x * 1
        for layer in layers:
            hidden = recompute(layer, hidden, **RECOMPUTED)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        hidden.sum().backward()
        assert x.grad is not None
        return held, x.grad.clone()

    held, expected = peak(checkpoint)
    ours, gradient = peak(offloaded(checkpoint))
    assert torch.equal(gradient, expected)
    assert held >= 8 * x.nbytes
    assert ours <= 2 * x.nbytes
