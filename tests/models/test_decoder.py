"""Both seed architectures, scattered over ranks, equal one device: loss and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqpar.batch import pack, shard
from seqpar.loss import token_loss_sum
from seqpar.models import Decoder, DecoderConfig, hybrid, lightning_log_decay, transnormer
from tests.ranks import run_ranks
from tests.tolerances import MODEL_GRADIENT, MODEL_LOSS, relative_error

LENGTHS = [1, 37, 2, 90, 1, 5]
CONFIGS = {
    "hybrid": hybrid(
        vocab_size=50,
        dim=32,
        num_layers=4,
        num_heads=2,
        hidden=24,
        softmax_every=2,
        softmax_heads=4,
        softmax_kv_heads=2,
        softmax_head_dim=8,
        softmax_strategy="ring",
    ),
    "transnormer": transnormer(vocab_size=50, dim=32, num_layers=2, num_heads=2, hidden=24),
}


def _documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(50, (length,), generator=generator) for length in LENGTHS]


def _loss_and_gradients(
    config: DecoderConfig, group: dist.ProcessGroup | None, layout: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = Decoder(config)
    batch = shard(pack(_documents()), group, layout=layout)
    loss, _ = token_loss_sum(model(**batch.inputs), batch.labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def _scattered(rank: int, layout: str) -> dict[str, Any]:
    found = {}
    for name, config in CONFIGS.items():
        loss, gradients = _loss_and_gradients(config, dist.group.WORLD, layout)
        for tensor in [loss, *gradients.values()]:
            dist.all_reduce(tensor)
        found[name] = (loss, gradients)
    return found


@pytest.mark.parametrize("layout", ["contiguous", "zigzag"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_scattered_equals_one_device(world_size: int, layout: str) -> None:
    found = run_ranks(world_size, _scattered, layout)[0]
    for name, config in CONFIGS.items():
        expected, reference = _loss_and_gradients(config, None, "contiguous")
        loss, gradients = found[name]
        assert relative_error(loss, expected) <= MODEL_LOSS
        assert set(gradients) == set(reference)
        for parameter, gradient in gradients.items():
            assert reference[parameter].norm() > 0, f"{parameter} is not trained"
            error = relative_error(gradient, reference[parameter])
            assert error <= MODEL_GRADIENT, f"{name} {parameter}: {error:.1e}"


@pytest.mark.parametrize("name", CONFIGS)
def test_documents_of_a_stream_do_not_see_each_other(name: str) -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIGS[name])
    documents = _documents()
    batch = shard(pack(documents), None)
    packed = model(**batch.inputs)[0].split(LENGTHS)
    for document, logits in zip(documents, packed, strict=True):
        assert relative_error(logits, model(document[None])[0]) <= 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_sees_the_future(name: str) -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIGS[name])
    ids = torch.randint(50, (1, 40))
    changed = ids.clone()
    changed[0, 25:] = (changed[0, 25:] + 1) % 50
    before, after = model(ids), model(changed)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.equal(before[:, 25], after[:, 25])


def test_decay_is_weaker_in_later_layers_and_never_grows() -> None:
    decays = torch.stack([lightning_log_decay(4, layer, 3) for layer in range(3)])
    assert (decays < 0).all()
    assert (decays.diff(dim=0) > 0).all()
    assert torch.allclose(decays[0], torch.tensor([-(2.0**-p) for p in (2, 4, 6, 8)]), atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_in_bfloat16_keeps_its_decays(name: str) -> None:
    torch.manual_seed(0)
    model = Decoder(CONFIGS[name])
    batch = shard(pack(_documents()), None)
    expected, _ = token_loss_sum(model(**batch.inputs), batch.labels)
    decays = {key: x.clone() for key, x in model.named_buffers() if "log_decay" in key}
    loss, _ = token_loss_sum(model.to(torch.bfloat16)(**batch.inputs).float(), batch.labels)
    loss.backward()
    assert decays
    for key, x in model.named_buffers():
        if key in decays:
            assert x.dtype == torch.float32
            assert torch.equal(x, decays[key])
    assert abs(loss.item() / expected.item() - 1) < 0.01
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
