"""Wrapped models under what training code puts around them, against one device."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from seqpar.adapters.tiny import TINY_VOCABULARY, tiny_model, tiny_stream
from seqpar.batch import Batch, PackedStream, shard
from seqpar.errors import UnsupportedModelError
from seqpar.gradients import reduce_gradients
from seqpar.loss import chunked_token_loss, count_targets, token_loss
from seqpar.parity import check_parity
from seqpar.tiles import tile_tokens
from seqpar.wrap import is_parallelized, parallelize
from tests.ranks import run_ranks
from tests.recompute import recompute_layers
from tests.tolerances import MODEL_GRADIENT, MODEL_LOSS, RELATIVE, relative_error

pytest.importorskip("transformers")

# Two micro-batches a step for each data-parallel rank, of different lengths and layouts.
STEP = {0: [(13, 1, 29, 2, 7), (3, 40)], 1: [(8,), (1, 2, 31)]}
LAYOUTS = ("contiguous", "zigzag")


def _mesh() -> Any:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))


def _batches(model: nn.Module, mesh: Any) -> list[Batch]:
    dp_rank = mesh.get_local_rank("dp")
    return [
        shard(tiny_stream(model, lengths, seed=10 * dp_rank + i), mesh["sp"], layout=LAYOUTS[i])  # type: ignore[arg-type]
        for i, lengths in enumerate(STEP[dp_rank])
    ]


def _step_of(model: nn.Module) -> list[PackedStream]:
    """The streams of all data-parallel ranks."""
    return [
        tiny_stream(model, lengths, seed=10 * dp_rank + i)
        for dp_rank, micro_batches in STEP.items()
        for i, lengths in enumerate(micro_batches)
    ]


def _one_device(
    model: nn.Module, streams: list[PackedStream]
) -> tuple[float, dict[str, Tensor], float]:
    """The mean loss over all documents of the streams, its gradients and their norm."""
    nll, targets = torch.zeros(()), 0
    for stream in streams:
        for a, b in itertools.pairwise(stream.cu_seqlens):
            logits = model(input_ids=stream.ids[:, a:b], use_cache=False).logits[0]
            labels = stream.labels[0, a:b]
            nll = nll + nn.functional.cross_entropy(logits, labels, reduction="sum")
            targets += int((labels >= 0).sum())
    loss = nll / targets
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), gradients, nn.utils.get_total_norm(gradients.values()).item()


def _train_step(model: nn.Module, mesh: Any, *, chunked: bool, sharded: bool) -> float:
    batches = _batches(model, mesh)
    targets = count_targets(batches, mesh=mesh)
    total = 0.0
    for index, batch in enumerate(batches):
        if sharded:
            model.set_requires_gradient_sync(index == len(batches) - 1)
        if chunked:
            loss = chunked_token_loss(model, batch, mesh=mesh, num_targets=targets)
        else:
            loss = token_loss(model(**batch.inputs).logits, batch, mesh=mesh, num_targets=targets)
        loss.backward()
        total += loss.item()
    return total


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _around(rank: int) -> dict[str, dict[str, Any]]:
    """Each way to train the same step: loss, gradients, the norm that clipping saw."""
    mesh = _mesh()
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    ways = {
        "replicated": {},
        "DDP": {},
        "fully_shard": {"mesh": flat},
        "hybrid shard": {"mesh": mesh},
        "chunked loss": {"mesh": flat},
        "tiled MLP": {"mesh": flat},
    }
    found = {}
    for way, options in ways.items():
        model = parallelize(tiny_model("llama").train(), mesh["sp"])
        recompute_layers(model)
        if way == "tiled MLP":
            for layer in model.model.layers:
                tile_tokens(layer.mlp, tokens=5)
        parameters = dict(model.named_parameters())
        if options:
            for layer in model.model.layers:
                fully_shard(layer, **options)
            fully_shard(model, **options)
            parameters = dict(model.named_parameters())
        outer = nn.parallel.DistributedDataParallel(model) if way == "DDP" else model
        chunked = way in ("chunked loss", "tiled MLP")
        loss = _train_step(outer, mesh, chunked=chunked, sharded=bool(options))
        if way == "replicated":
            reduce_gradients(model, mesh)
        gradients = {name: _full(p.grad).clone() for name, p in parameters.items()}
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        found[way] = {"loss": loss, "gradients": gradients, "norm": _full(norm).item()}
    return found


def test_every_way_to_train_gives_the_one_device_step() -> None:
    results = run_ranks(4, _around, timeout_s=120)
    model = tiny_model("llama")
    loss, gradients, norm = _one_device(model, _step_of(model))
    for result in results:
        for way, found in result.items():
            assert abs(found["loss"] / loss - 1) < MODEL_LOSS, way
            assert abs(found["norm"] / norm - 1) < MODEL_GRADIENT, way
            assert found["gradients"].keys() == gradients.keys()
            for name, gradient in found["gradients"].items():
                assert relative_error(gradient, gradients[name]) < MODEL_GRADIENT, (way, name)


# -- every split, sharded ------------------------------------------------------------------------

DOCUMENTS = ((13, 1, 29), (3, 40), (8,), (1, 2, 31))
"""Four streams of one step, dealt to the data-parallel ranks."""


def _sharded_on(dp: int) -> tuple[float, dict[str, Tensor]]:
    """One step on dp x (4 / dp) ranks: each data-parallel rank accumulates its streams."""
    mesh = init_device_mesh("cpu", (dp, 4 // dp), mesh_dim_names=("dp", "sp"))
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("fsdp",))
    model = parallelize(tiny_model("llama").train(), mesh["sp"])
    for layer in model.model.layers:
        fully_shard(layer, mesh=flat)
    fully_shard(model, mesh=flat)
    batches = [
        shard(tiny_stream(model, lengths, seed=i), mesh["sp"], layout=LAYOUTS[i % 2])  # type: ignore[arg-type]
        for i, lengths in enumerate(DOCUMENTS)
        if i % dp == mesh.get_local_rank("dp")
    ]
    targets, total = count_targets(batches, mesh=mesh), 0.0
    for batch in batches:
        loss = token_loss(model(**batch.inputs).logits, batch, mesh=mesh, num_targets=targets)
        loss.backward()
        total += loss.item()
    return total, {name: _full(p.grad) for name, p in model.named_parameters()}


def _sharded_on_every_split(rank: int) -> dict[int, tuple[float, dict[str, Tensor]]]:
    return {dp: _sharded_on(dp) for dp in (1, 2, 4)}


def test_sharded_on_every_split_gives_the_one_device_step() -> None:
    results = run_ranks(4, _sharded_on_every_split)
    model = tiny_model("llama")
    streams = [tiny_stream(model, lengths, seed=i) for i, lengths in enumerate(DOCUMENTS)]
    loss, gradients, _ = _one_device(model, streams)
    for result in results:
        for dp, (ours, found) in result.items():
            assert abs(ours / loss - 1) < MODEL_LOSS, dp
            assert found.keys() == gradients.keys()
            for name, gradient in found.items():
                assert relative_error(gradient, gradients[name]) < MODEL_GRADIENT, (dp, name)


# -- adapters, autocast, compile ------------------------------------------------------------------


def _lora(*, wrap_first: bool) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(0)
    model = tiny_model("llama")
    if wrap_first:
        parallelize(model, dist.group.WORLD)
    adapted = get_peft_model(model, config)
    if not wrap_first:
        parallelize(adapted, dist.group.WORLD)
    assert is_parallelized(adapted)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # peft starts it at zero, where half the gradients vanish
            nn.init.normal_(parameter, std=0.1)
    return adapted


def _with_lora(rank: int) -> dict[str, int]:
    compared = {}
    for order in ("wrapped before", "wrapped after"):
        model = _lora(wrap_first=order == "wrapped before")
        batch = shard(tiny_stream(model, (13, 1, 29, 7)), dist.group.WORLD)
        report = check_parity(model, batch)
        compared[order] = len(report.gradient_errors)
    return compared


def test_lora_adapters_before_or_after() -> None:
    pytest.importorskip("peft")
    for compared in run_ranks(2, _with_lora):
        assert compared == {"wrapped before": 12, "wrapped after": 12}  # 2 layers x 3 x A and B


def _lora_sharded(rank: int) -> dict[str, dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("sp",))
    found = {}
    for way in ("replicated", "sharded"):
        model = _lora(wrap_first=False).train()
        batch = shard(tiny_stream(model, (13, 1, 29, 7)), mesh)
        if way == "sharded":
            for layer in model.get_base_model().model.layers:
                tile_tokens(layer.mlp, tokens=5)
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)
        chunked_token_loss(model, batch).backward()
        if way == "replicated":
            reduce_gradients(model, mesh)
        found[way] = {n: _full(p.grad) for n, p in model.named_parameters() if p.requires_grad}
    return found


def test_lora_adapters_train_alike_when_sharded_and_tiled() -> None:
    pytest.importorskip("peft")
    for found in run_ranks(2, _lora_sharded):
        assert found["sharded"].keys() == found["replicated"].keys()
        for name, gradient in found["sharded"].items():
            assert relative_error(gradient, found["replicated"][name]) < MODEL_GRADIENT, name


# Every kind of mixer: softmax, lightning with experts, Mamba-2.
KINDS = ("llama", "minimax", "bamba")
LENGTHS = (13, 1, 29, 7)


def _whole_documents(family: str) -> tuple[float, dict[str, Tensor]]:
    model = tiny_model(family)
    loss, gradients, _ = _one_device(model, [tiny_stream(model, LENGTHS)])
    return loss, gradients


def _every_kind(rank: int) -> dict[tuple[str, str], Any]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("sp",))
    found: dict[tuple[str, str], Any] = {}
    for family in KINDS:
        model = parallelize(tiny_model(family), mesh)
        batch = shard(tiny_stream(model, LENGTHS), mesh, layout="zigzag")
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(**batch.inputs).logits
            token_loss(logits, batch).backward()
        reduce_gradients(model, mesh)
        found[family, "autocast"] = (model.get_output_embeddings().weight.grad, logits.dtype)

        model = parallelize(tiny_model(family).train(), mesh)
        recompute_layers(model)
        for layer in model.base_model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        loss = chunked_token_loss(model, batch)
        loss.backward()
        gradients = {name: _full(p.grad) for name, p in model.named_parameters()}
        found[family, "sharded"] = (loss.item(), gradients)
    return found


@pytest.fixture(scope="module")
def every_kind() -> list[dict[tuple[str, str], Any]]:
    return run_ranks(2, _every_kind)


@pytest.mark.parametrize("family", KINDS)
def test_autocast_computes_in_bf16_and_agrees(
    every_kind: list[dict[tuple[str, str], Any]], family: str
) -> None:
    _, expected = _whole_documents(family)
    for found in every_kind:
        gradient, dtype = found[family, "autocast"]
        assert dtype == torch.bfloat16
        error = relative_error(gradient, expected["lm_head.weight"])
        assert 1e-4 < error < 6 * RELATIVE[torch.bfloat16]  # several roundings deep


@pytest.mark.parametrize("family", KINDS)
def test_layers_sharded_and_recomputed_agree(
    every_kind: list[dict[tuple[str, str], Any]], family: str
) -> None:
    loss, expected = _whole_documents(family)
    for found in every_kind:
        ours, gradients = found[family, "sharded"]
        assert abs(ours / loss - 1) < MODEL_LOSS
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) < MODEL_GRADIENT, name


def test_a_head_that_is_not_one_linear_layer_is_refused() -> None:
    model = parallelize(tiny_model("bert"), None)
    batch = shard(tiny_stream(model, (9,)), None)
    with pytest.raises(UnsupportedModelError, match="no causal model with one linear head"):
        chunked_token_loss(model, batch)
    assert model(**batch.inputs).logits.shape[-1] == TINY_VOCABULARY
