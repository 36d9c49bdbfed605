"""`fully_shard` of any modules, before or after the model is wrapped: the one-device gradients.

`fully_shard` gives a module a class of its own, derived from what it was.
"""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.loss import token_loss
from seqpar.wrap import parallelize
from tests.ranks import run_ranks
from tests.tolerances import MODEL_GRADIENT, MODEL_LOSS, relative_error

pytest.importorskip("transformers")

SHARDED = {
    "minimax": "MiniMaxLightningAttention",
    "mamba2": "Mamba2Mixer",
    "bamba": "BambaMixer",
    "llama": "LlamaAttention",
    "t5": "T5Block",
}
"""By family, the modules that are sharded by themselves. A T5's blocks share one's biases."""


def _step(model: nn.Module, mesh: Any) -> tuple[float, dict[str, Tensor]]:
    batch = shard(tiny_stream(model, (13, 1, 29)), mesh)
    loss = token_loss(model(**batch.inputs).logits, batch)
    loss.backward()
    gradients: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    full = {n: g.full_tensor() if mesh else g for n, g in gradients.items()}
    return loss.item(), full


def _sharded(rank: int, wrap_first: bool) -> dict[str, tuple[float, dict[str, Tensor]]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("sp",))
    found = {}
    for family, kind in SHARDED.items():
        model = tiny_model(family).train()
        if wrap_first:
            parallelize(model, mesh)
        for module in [m for m in model.modules() if type(m).__name__ == kind]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if not wrap_first:
            parallelize(model, mesh)
        found[family] = _step(model, mesh)
    return found


@pytest.mark.parametrize("wrap_first", [True, False], ids=["after wrapping", "before wrapping"])
def test_any_module_may_be_sharded_by_itself(wrap_first: bool) -> None:
    one_device = {family: _step(parallelize(tiny_model(family), None), None) for family in SHARDED}
    for found in run_ranks(2, _sharded, wrap_first):
        for family, (loss, gradients) in found.items():
            expected_loss, expected = one_device[family]
            assert abs(loss / expected_loss - 1) < MODEL_LOSS, family
            assert gradients.keys() == expected.keys()
            for name, gradient in gradients.items():
                assert relative_error(gradient, expected[name]) < MODEL_GRADIENT, (family, name)
