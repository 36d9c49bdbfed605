"""The parity check finds planted errors, and names where they begin."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import seqpar.adapters.hf_attention as hf_attention
import seqpar.parity as parity
from seqpar.adapters.families import family_of
from seqpar.adapters.tiny import TINY_VOCABULARY, tiny_model, tiny_stream
from seqpar.batch import Batch, pack, shard
from seqpar.errors import DataError, ParityError, UnsupportedModelError
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax import softmax_attention
from seqpar.parity import check_parity
from seqpar.parity_ranks import ParityJob, check_on_ranks
from seqpar.ranks import run_on_ranks
from seqpar.wrap import parallelize
from tests.ranks import run_ranks
from tests.small_hybrid import small_hybrid

pytest.importorskip("transformers")


def _batch(where: Any, *, layout: str = "contiguous", seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    documents = [
        torch.randint(3, TINY_VOCABULARY, (n,), generator=generator) for n in (9, 1, 17, 5)
    ]
    return shard(pack(documents), where, layout=layout)  # type: ignore[arg-type]


def _leaking(q: Tensor, k: Tensor, v: Tensor, *, layout: SequenceLayout, **options: Any) -> Tensor:
    """Attention that takes the stream for one document."""
    one = SequenceLayout((0, layout.num_tokens), layout.spans)
    return softmax_attention(q, k, v, layout=one, **options)


def _without_value_gradient(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return softmax_attention(q, k, v.detach(), **options)


def _scaled_loss(logits: Tensor, batch: Batch, **options: Any) -> Tensor:
    return TOKEN_LOSS(logits, batch, **options) * 4


TOKEN_LOSS = parity.token_loss


def _message(
    batch: Batch,
    patch: Callable[[pytest.MonkeyPatch], None] | None = None,
    *,
    check: bool = True,
) -> str:
    model = parallelize(tiny_model("llama"), dist.group.WORLD, check=check)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if patch is not None:
            patch(monkeypatch)
        with pytest.raises(ParityError) as caught:
            check_parity(model, batch)
    return str(caught.value)


def _planted(rank: int) -> dict[str, str]:
    batch = _batch(dist.group.WORLD)
    restarted = torch.arange(batch.ids.shape[1])[None]  # every rank counts from 0
    return {
        "position": _message(dataclasses.replace(batch, position_ids=restarted), check=False),
        "leak": _message(batch, lambda m: m.setattr(hf_attention, "softmax_attention", _leaking)),
        "gradient": _message(
            batch, lambda m: m.setattr(hf_attention, "softmax_attention", _without_value_gradient)
        ),
        "loss": _message(batch, lambda m: m.setattr(parity, "token_loss", _scaled_loss)),
    }


def test_planted_errors_are_found_and_named() -> None:
    results = run_ranks(4, _planted)
    assert results[1:] == results[:1] * 3  # every rank says the same
    found = results[0]
    assert "output of model.rotary_emb" in found["position"]
    assert "output of model.layers.0.self_attn" in found["leak"]
    assert "gradient of model.layers.1.self_attn.v_proj" in found["gradient"]
    assert "relative error 3.0e+00" in found["loss"]


def _over_dp_and_sp(rank: int) -> dict[str, float]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    model = parallelize(small_hybrid(), mesh["sp"])
    layout = "zigzag" if mesh.get_local_rank("dp") else "contiguous"
    batch = _batch(mesh["sp"], layout=layout, seed=mesh.get_local_rank("dp"))
    before = torch.random.get_rng_state()
    report = check_parity(model, batch, mesh)
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    # Each data-parallel rank has its own documents: the mean over both is neither's own.
    alone = check_parity(model, batch)
    return {"both": report.loss, "alone": alone.loss}


def test_the_mean_is_over_dp_and_sp() -> None:
    results = run_ranks(4, _over_dp_and_sp)
    assert len({round(result["both"], 6) for result in results}) == 1
    assert len({round(result["alone"], 6) for result in results}) == 2
    assert min(abs(r["both"] - r["alone"]) for r in results) > 1e-3


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="not wrapped"):
        check_parity(small_hybrid(), _batch(None))
    model = small_hybrid()
    model.drop = torch.nn.Dropout(0.1)
    with pytest.raises(UnsupportedModelError, match="different masks"):
        check_parity(parallelize(model, None).train(), _batch(None))


def test_one_rank_alone_needs_no_process_group() -> None:
    report = check_parity(parallelize(small_hybrid(), None), _batch(None))
    assert report.ok
    assert report.worst_parameter in report.gradient_errors


def test_the_command_checks_and_fails_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    import typer

    from seqpar.commands.check import command

    command("tests.small_hybrid:small_hybrid", ranks=2, as_json=True)
    good = json.loads(capsys.readouterr().out)
    assert good["ok"]
    assert good["loss_error"] < 1e-5
    with pytest.raises(typer.Exit) as caught:
        command("tests.small_hybrid:forgets_the_other_ranks", ranks=2, as_json=True)
    assert caught.value.exit_code == 1
    bad = json.loads(capsys.readouterr().out)
    assert not bad["ok"]
    assert "output of layers.1" in bad["error"]


def _unlike_weights(rank: int) -> str:
    torch.manual_seed(rank)
    model = small_hybrid()
    torch.nn.init.normal_(model.layers[1].out.weight)
    with pytest.raises(ParityError) as caught:
        check_parity(parallelize(model, dist.group.WORLD), _batch(dist.group.WORLD))
    return str(caught.value)


def test_ranks_with_different_weights_are_told_so() -> None:
    for message in run_ranks(2, _unlike_weights):
        assert "different weights, first in layers.1.out.weight: call torch.manual_seed" in message


@pytest.mark.parametrize(
    ("name", "module", "reason"),
    [
        ("qwen3_next", "layers.0.linear_attn (Qwen3NextGatedDeltaNet)", "delta rule"),
        ("KimiLinearConfig", "self_attn (KimiLinearDeltaAttention)", "delta rule"),
        ("olmo_hybrid", "linear_attn (OlmoHybridGatedDeltaNet)", "delta rule"),
        ("BailingHybridForCausalLM", "self_attn (BailingHybridDeltaAttention)", "delta rule"),
        ("qwen3_5_text", "linear_attn (Qwen3_5GatedDeltaNet)", "delta rule"),
        ("falcon_mamba", "mixer (FalconMambaMixer)", "Mamba-1"),
        ("jamba", "mamba (JambaMambaMixer)", "Mamba-1"),
        ("mamba", "mixer (MambaMixer)", "Mamba-1"),
        ("recurrent_gemma", "temporal_block (RecurrentGemmaRecurrentBlock)", "for each channel"),
        ("rwkv", "attention (RwkvSelfAttention)", "for each channel"),
        ("OPTForCausalLM", "OPTForCausalLM", "no test has shown the family 'opt'"),
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", "nothing is downloaded"),
    ],
)
def test_the_check_refuses_by_module_and_reason(name: str, module: str, reason: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        check_on_ranks(ParityJob(name, ranks=1))
    assert module in caught.value.module
    assert reason in caught.value.reason
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["llama", "LlamaConfig", "LlamaForCausalLM", "LlamaModel"])
def test_a_family_goes_by_its_class_names_too(name: str) -> None:
    assert family_of(name) == "llama"


def test_a_module_in_the_users_folder_is_found(tmp_path: Path) -> None:
    """As the installed script is run: its own folder is on the path, the user's is not."""
    (tmp_path / "mine.py").write_text("from tests.small_hybrid import small_hybrid as build\n")
    root = Path(__file__).parent.parent
    code = f"import sys; sys.path[:1] = [{str(root)!r}]; from seqpar.cli import main; main()"
    words = [sys.executable, "-c", code, "check", "mine:build", "--ranks", "2"]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("mine:build: loss ")


def _no_targets(rank: int) -> str:
    batch = shard(pack([[1], [2]]), dist.group.WORLD)
    with pytest.raises(DataError) as caught:
        check_parity(parallelize(small_hybrid(), dist.group.WORLD), batch)
    return str(caught.value)


def test_a_batch_without_targets_is_refused_on_every_rank() -> None:
    for message in run_ranks(4, _no_targets):  # two of them hold no token at all
        assert "no token of the batch is a target" in message


@pytest.mark.parametrize(
    ("family", "option"),
    [("minimax", "router_jitter_noise"), ("starcoder2", "residual_dropout")],
)
def test_a_model_that_draws_random_numbers_is_refused(family: str, option: str) -> None:
    """In functions, where no layer shows it: its two runs differ, and nothing is wrong."""
    model = parallelize(tiny_model(family, **{option: 0.3}), None).train()
    batch = shard(tiny_stream(model, (13, 1, 29)), None)
    with pytest.raises(UnsupportedModelError, match=r"draws random numbers.*model\.eval\(\)"):
        check_parity(model, batch)
    assert check_parity(model.eval(), batch).ok


def _without_heads(rank: int) -> dict[str, float]:
    found = {}
    for family in ("llama", "mamba2"):
        whole = tiny_model(family)
        model = parallelize(whole.base_model, dist.group.WORLD)
        batch = shard(tiny_stream(whole, (13, 1, 29)), dist.group.WORLD)
        found[family] = check_parity(model, batch).gradient_error
    return found


def test_models_without_a_head_are_compared_by_their_hidden_states() -> None:
    """32 numbers a token, and labels up to 60."""
    assert max(run_ranks(2, _without_heads)[0].values()) > 0


def test_a_function_that_returns_no_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"it returned OrderedDict, no nn.Module"):
        check_on_ranks(ParityJob("collections:OrderedDict", ranks=1))


def test_unknown_functions_are_refused_by_the_check() -> None:
    with pytest.raises(UnsupportedModelError, match="no such function"):
        check_on_ranks(ParityJob("tests.small_hybrid:nothing", ranks=1))


def _check_families(rank: int, device: str) -> dict[str, float]:
    errors = {}
    for family in ("llama", "mistral", "minimax", "mamba2"):
        model = tiny_model(family).to(device, torch.float32)
        stream = tiny_stream(model, (130, 1, 290, 27))
        parallelize(model, dist.group.WORLD)
        for layout in ("contiguous", "zigzag"):
            batch = shard(stream, dist.group.WORLD, layout=layout, device=device)  # type: ignore[arg-type]
            errors[f"{family} {layout}"] = check_parity(model, batch).gradient_error
    return errors


@pytest.mark.multigpu
def test_two_cuda_devices_agree_with_one() -> None:
    """In one world for all: a process takes seconds to start on CUDA, and NCCL as long."""
    errors = run_on_ranks(_check_families, "cuda", ranks=2, device="cuda", timeout_s=120.0)[0]
    assert len(errors) == 8
    assert max(errors.values()) > 0, "nothing was compared: float32 sums in another order differ"
