"""Random numbers over a mesh: no two ranks draw the same masks, and a seed gives its run again."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.errors import MeshError
from seqpar.gradients import reduce_gradients, seed_ranks
from seqpar.loss import chunked_token_loss
from seqpar.wrap import parallelize
from tests.ranks import run_ranks
from tests.recompute import recompute_layers

pytest.importorskip("transformers")


def _mesh() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))


def _model(mesh: Any, *, checkpointed: bool) -> nn.Module:
    model = parallelize(tiny_model("gpt_neox", hidden_dropout=0.5).train(), mesh["sp"])
    if checkpointed:
        recompute_layers(model)
    return model


def _masks(rank: int) -> dict[str, Tensor]:
    mesh = _mesh()
    model = _model(mesh, checkpointed=False)
    batch = shard(tiny_stream(model, (40,)), mesh["sp"])
    masks = []

    def keep_mask(module: nn.Module, arguments: Any, output: Tensor) -> None:
        masks.append(output == 0)

    model.gpt_neox.emb_dropout.register_forward_hook(keep_mask)
    for seed in (7, 7, 8):
        seed_ranks(seed, mesh)
        model(**batch.inputs)
    return {"first": masks[0], "again": masks[1], "other": masks[2]}


def test_dropout_masks_differ_between_ranks_and_repeat_with_the_seed() -> None:
    results = run_ranks(4, _masks)
    for a, b in itertools.combinations(results, 2):
        assert 0.4 < (a["first"] == b["first"]).float().mean() < 0.6  # independent coins
    for result in results:
        assert torch.equal(result["first"], result["again"])
        assert not torch.equal(result["first"], result["other"])


def _run(mesh: Any, seed: int, *, checkpointed: bool) -> tuple[list[float], list[Tensor]]:
    """Three optimizer steps with dropout, streams of changing layouts."""
    model = _model(mesh, checkpointed=checkpointed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seed_ranks(seed, mesh)
    losses = []
    for step, layout in enumerate(("contiguous", "zigzag", "contiguous")):
        stream = tiny_stream(model, (13, 1, 29, 7), seed=10 * step + mesh.get_local_rank("dp"))
        batch = shard(stream, mesh["sp"], layout=layout)  # type: ignore[arg-type]
        loss = chunked_token_loss(model, batch, mesh=mesh)
        loss.backward()
        reduce_gradients(model, mesh)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


def _runs(rank: int) -> dict[str, tuple[list[float], list[Tensor]]]:
    mesh = _mesh()
    runs = {"first": (7, False), "again": (7, False), "recomputed": (7, True), "other": (8, False)}
    return {
        name: _run(mesh, seed, checkpointed=checkpointed)
        for name, (seed, checkpointed) in runs.items()
    }


def test_a_fixed_seed_gives_the_same_run_twice() -> None:
    """To the last bit, recomputed layers included, which must draw their first masks again."""
    for runs in run_ranks(4, _runs):
        losses, weights = runs["first"]
        for name in ("again", "recomputed"):
            assert runs[name][0] == losses, name
            assert all(map(torch.equal, runs[name][1], weights)), name
        assert runs["other"][0][0] != losses[0]


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(MeshError, match="whole number from 0 on, got -1"):
        seed_ranks(-1, None)  # type: ignore[arg-type]
