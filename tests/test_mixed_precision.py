"""Half precision around wrapped models: float16 with a gradient scaler, bfloat16 with masters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.gradients import reduce_gradients
from seqpar.loss import chunked_token_loss, token_loss
from seqpar.wrap import parallelize
from tests.ranks import run_ranks
from tests.tolerances import relative_error

pytest.importorskip("transformers")

KINDS = ("llama", "bamba")
"""Softmax; Mamba-2. Rounding makes experts choose others, so none are compared."""
LENGTHS = (13, 1, 29, 7)
SCALE = 1024.0
FLOAT16, BFLOAT16 = 1e-2, 8e-2
"""Of the head's gradient: roundings of 11 and 8 bits, several deep."""


def _model(family: str, mesh: Any, *, sharded: bool, **options: Any) -> nn.Module:
    model = parallelize(tiny_model(family).train(), mesh)
    if sharded:
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=mesh, **options)
        fully_shard(model, mesh=mesh, **options)
    return model


def _whole(gradient: Any) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def _scaled(rank: int) -> dict[tuple[str, bool], tuple[float, Tensor, float]]:
    """Loss, the head's unscaled gradient, and the scale after a step that one rank overflows."""
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("sp",))
    found = {}
    for family in KINDS:
        for sharded in (False, True):
            model = _model(family, mesh, sharded=sharded)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
            batch = shard(tiny_stream(model, LENGTHS), mesh)
            for overflow in (1.0, 1e30 if rank else 1.0):
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.float16):
                    loss = token_loss(model(**batch.inputs).logits, batch)
                (scaler.scale(loss) * overflow).backward()
                if not sharded:
                    reduce_gradients(model, mesh)
                if overflow == 1.0 and (family, sharded) not in found:
                    scaler.unscale_(optimizer)
                    gradient = _whole(model.lm_head.weight.grad).clone()
                    found[family, sharded] = (loss.item(), gradient)
                scaler.step(optimizer)
                scaler.update()
            found[family, sharded] += (scaler.get_scale(),)
    return found


def _masters(rank: int) -> dict[str, tuple[float, Tensor]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("sp",))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    found = {}
    for family in KINDS:
        model = _model(family, mesh, sharded=True, mp_policy=policy)
        batch = shard(tiny_stream(model, LENGTHS), mesh)
        loss = chunked_token_loss(model, batch)
        loss.backward()
        found[family] = (loss.item(), _whole(model.lm_head.weight.grad))
    return found


def _one_device(family: str) -> tuple[float, Tensor]:
    model = parallelize(tiny_model(family), None)
    batch = shard(tiny_stream(model, LENGTHS), None)
    loss = token_loss(model(**batch.inputs).logits, batch)
    loss.backward()
    return loss.item(), model.lm_head.weight.grad


def test_float16_with_a_gradient_scaler_and_a_rank_that_overflows() -> None:
    expected = {family: _one_device(family) for family in KINDS}
    for found in run_ranks(2, _scaled):
        for (family, sharded), (loss, gradient, scale) in found.items():
            expected_loss, expected_gradient = expected[family]
            assert abs(loss / expected_loss - 1) < 1e-3, (family, sharded)
            error = relative_error(gradient, expected_gradient)
            assert 1e-5 < error < FLOAT16, (family, sharded)  # it did compute in float16
            assert scale == SCALE / 2, (family, sharded)  # every rank skipped the second step


def test_bfloat16_with_float32_masters() -> None:
    expected = {family: _one_device(family) for family in KINDS}
    for found in run_ranks(2, _masters):
        for family, (loss, gradient) in found.items():
            expected_loss, expected_gradient = expected[family]
            assert gradient.dtype == torch.float32
            assert abs(loss / expected_loss - 1) < 5e-3, family
            assert 1e-4 < relative_error(gradient, expected_gradient) < BFLOAT16, family
