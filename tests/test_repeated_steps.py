"""Hybrid models over steps in which state calls are recorded and repeated, against one device.

From the third call of a kind on, CUDA ranks launch what they wrote down (docs/state.md). So each
step has other tokens and other weights, and its micro-batches run forward together before either
runs backward: a stale address would show in some parameter's gradient. On gloo nothing is recorded,
and the same steps hold the test itself to account.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from seqpar.adapters.tiny import tiny_model
from seqpar.batch import PackedStream, pack, shard
from seqpar.comm import shares_memory
from seqpar.gradients import reduce_gradients
from seqpar.layout import SequenceLayout
from seqpar.loss import token_loss
from seqpar.mesh import GroupPool
from seqpar.models.decoder import Decoder, hybrid
from seqpar.ops import state_recorded
from seqpar.ranks import run_on_ranks
from seqpar.wrap import parallelize, unparallelize
from tests.recompute import recompute_layers
from tests.tolerances import MODEL_GRADIENT, MODEL_LOSS, relative_error

pytest.importorskip("transformers")

STEPS, MICRO_BATCHES = 4, 2
DECAY_GRADIENT = 1e-3
"""In float32, of what decays are learned by. Their gradient is summed from differences over all
later tokens of a segment, whose rounding walks, and what is left of 700 tokens a head is small: the
kernels on one device are 2e-4 from float64 there too, and chunks in torch 2e-5 (docs/state.md)."""
BFLOAT16_LOSS, BFLOAT16_GRADIENT = 5e-3, 8e-2
"""Of a model in bfloat16 against the same weights in float32: 8 bits of mantissa, each layer."""


def _model(name: str) -> nn.Module:
    """Heads of the size that the kernels are made for; every expert is taken, so that rounding
    chooses no other."""
    if name == "own hybrid":
        torch.manual_seed(0)
        sizes = {"softmax_heads": 4, "softmax_kv_heads": 2, "softmax_head_dim": 32}
        return Decoder(
            hybrid(
                vocab_size=61,
                dim=128,
                num_layers=3,
                num_heads=2,
                hidden=96,
                softmax_every=3,
                **sizes,
            )
        )
    wide = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    options: dict[str, dict[str, Any]] = {
        "minimax": {"head_dim": 64, "num_local_experts": 2, **wide},
        "bamba": {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 64, **wide},
    }
    return tiny_model(name, **options[name])


def _streams(step: int) -> list[PackedStream]:
    """One document each, so that no document ends where a state enters."""
    generator = torch.Generator().manual_seed(step)
    return [pack([torch.randint(3, 61, (700,), generator=generator)]) for _ in range(MICRO_BATCHES)]


def _one_device(
    model: nn.Module, streams: list[PackedStream], device: str
) -> tuple[float, dict[str, Tensor]]:
    """In float32, by the model's own forward where it has one."""
    reference = unparallelize(copy.deepcopy(model)).float()
    reference.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    for stream in streams:
        batch = shard(stream, None, device=device)
        if isinstance(reference, Decoder):
            logits = reference(**batch.inputs)
        else:
            logits = reference(input_ids=batch.ids, use_cache=False).logits
        total = total + token_loss(logits, batch, grad_reduction="sum") / len(streams)
    total.backward()
    return total.item(), {name: p.grad for name, p in reference.named_parameters()}


def _steps(
    group: dist.ProcessGroup, name: str, device: str, dtype: torch.dtype, recomputed: bool
) -> dict[str, Any]:
    state_recorded._CALLS.pop(group, None)
    model = parallelize(_model(name).to(device).train(), group)
    for parameter in model.parameters():  # and not the buffers: decays are float32
        parameter.data = parameter.data.to(dtype)
    if recomputed:
        recompute_layers(model)
    layout = SequenceLayout.contiguous((0, 700), dist.get_world_size())  # one: part of the kind
    mesh = dist.device_mesh.init_device_mesh(device, (dist.get_world_size(),))
    worst: dict[str, Any] = {"loss": 0.0, "gradient": 0.0, "decay": 0.0}
    for step in range(STEPS):
        streams = _streams(step)
        loss, expected = _one_device(model, streams, device)
        batches = [shard(stream, group, layout=layout, device=device) for stream in streams]
        losses = [token_loss(_logits(model, batch), batch) / MICRO_BATCHES for batch in batches]
        for each in losses:
            each.backward()
        reduce_gradients(model, mesh)
        worst["loss"] = max(worst["loss"], abs(sum(x.item() for x in losses) / loss - 1))
        for parameter_name, parameter in model.named_parameters():
            assert parameter.grad is not None, parameter_name
            error = relative_error(parameter.grad, expected[parameter_name])
            if parameter_name.endswith(("A_log", "dt_bias")):
                worst["decay"] = max(worst["decay"], error)
            elif error > worst["gradient"]:
                worst.update({"gradient": error, "at": f"{parameter_name}, step {step}"})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.02 * parameter.grad / parameter.grad.norm().clamp_min(1e-6)
        model.zero_grad(set_to_none=True)
    calls = [known.call for known in state_recorded._CALLS.get(group, {}).values()]
    return {**worst, "kinds": len(calls), "repeated": sum(call.is_ready for call in calls)}


def _logits(model: nn.Module, batch: Any) -> Tensor:
    output = model(**batch.inputs)
    return output if isinstance(output, Tensor) else output.logits


Case = tuple[str, torch.dtype, bool]
"""Model, dtype, whether its layers are recomputed."""
CASES: list[Case] = [
    ("minimax", torch.bfloat16, True),
    ("bamba", torch.float32, True),
    ("own hybrid", torch.float32, False),
    ("own hybrid", torch.bfloat16, False),
]


def _cases(rank: int, device: str, cases: list[Case]) -> dict[str, list[Any]]:
    """By what carries the states: messages, and on CUDA memory that peers read."""
    groups = {"messages": dist.group.WORLD}
    if device == "cuda":
        pool, ranks = GroupPool(), tuple(range(dist.get_world_size()))
        pool.prepare([ranks])
        assert shares_memory(pool.group(ranks)), "these devices cannot read each other's memory"
        groups["peers' memory"] = pool.group(ranks)
    return {
        carrier: [_steps(group, name, device, *options) for name, *options in cases]
        for carrier, group in groups.items()
    }


def _check(results: dict[str, list[Any]], cases: list[Case]) -> None:
    for carrier, found in results.items():
        for (name, dtype, _), errors in zip(cases, found, strict=True):
            exact = dtype == torch.float32
            said = (carrier, name, dtype, errors)
            assert errors["loss"] < (MODEL_LOSS if exact else BFLOAT16_LOSS), said
            assert 0 < errors["gradient"] < (MODEL_GRADIENT if exact else BFLOAT16_GRADIENT), said
            assert errors["decay"] < (DECAY_GRADIENT if exact else BFLOAT16_GRADIENT), said


def test_steps_on_two_cpu_ranks_agree_with_one_device() -> None:
    for results in run_on_ranks(_cases, "cpu", CASES, ranks=2, device="cpu", timeout_s=120.0):
        _check(results, CASES)
        assert all(errors["kinds"] == 0 for errors in results["messages"])


@pytest.mark.multigpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}, {case[1]}")
def test_repeated_steps_on_two_gpus_agree_with_one(case: Case) -> None:
    """A world for each, so that each says how it ended: kernels are compiled on the way."""
    for results in run_on_ranks(_cases, "cuda", [case], ranks=2, device="cuda", timeout_s=150.0):
        _check(results, [case])
        for found in results.values():
            assert all(errors["repeated"] == errors["kinds"] > 0 for errors in found), results
