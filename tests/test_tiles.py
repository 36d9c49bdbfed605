"""Modules run by tiles of tokens: the same numbers, and no whole intermediate tensor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from seqpar.adapters.tiny import tiny_model, tiny_stream
from seqpar.batch import shard
from seqpar.errors import LayoutError, UnsupportedModelError
from seqpar.parity import check_parity
from seqpar.tiles import tile_layers, tile_tokens
from seqpar.wrap import parallelize, unparallelize
from tests.tolerances import RELATIVE, relative_error

HIDDEN, WIDE = 8, 256


def _mlp(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(HIDDEN, WIDE), nn.GELU(), nn.Linear(WIDE, HIDDEN)).to(dtype)


def _gradients(module: nn.Module, hidden: Tensor, *, recomputed: bool = False) -> list[Tensor]:
    """Of the input and the parameters that want one."""
    hidden = hidden.detach().requires_grad_()
    output = checkpoint(module, hidden, use_reentrant=False) if recomputed else module(hidden)
    wanted = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(output.double().square().sum(), [hidden, *wanted]))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 23, 40])
def test_tiles_give_the_module_s_own_numbers(tokens: int, frozen: bool, recomputed: bool) -> None:
    """Under activation checkpointing too, which hands saved tensors back detached."""
    module = _mlp()
    module[0].weight.requires_grad_(not frozen)
    hidden = torch.randn(2, 23, HIDDEN)
    tiled = tile_tokens(copy.deepcopy(module), tokens=tokens)
    assert relative_error(tiled(hidden), module(hidden)) < RELATIVE[torch.float32]
    ours = _gradients(tiled, hidden, recomputed=recomputed)
    for gradient, expected in zip(ours, _gradients(module, hidden), strict=True):
        assert relative_error(gradient, expected) < RELATIVE[torch.float32]


def test_gradients_are_summed_over_tiles_in_fp32() -> None:
    """A bf16 sum over 512 tiles would lose most of its digits."""
    module = _mlp(torch.bfloat16)
    hidden = torch.randn(1, 512, HIDDEN).bfloat16()
    expected = _gradients(_mlp().double(), hidden.double())
    ours = _gradients(tile_tokens(copy.deepcopy(module), tokens=1), hidden)
    whole = _gradients(module, hidden)
    for tiled, plain, reference in zip(ours, whole, expected, strict=True):
        assert relative_error(tiled, reference) < 1.5 * relative_error(plain, reference)


def test_autocast_holds_when_a_tile_is_computed_again() -> None:
    module = tile_tokens(_mlp(), tokens=4)
    dtypes = []
    module[0].register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output = module(torch.randn(1, 8, HIDDEN, requires_grad=True))
    output.float().sum().backward()
    assert dtypes == [torch.bfloat16] * 4  # two tiles, twice


def test_no_intermediate_tensor_is_whole() -> None:
    module, tokens = tile_tokens(_mlp(), tokens=16), 512
    hidden = torch.randn(1, tokens, HIDDEN, requires_grad=True)
    with torch.profiler.profile(profile_memory=True) as profile:
        module(hidden).sum().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 4 * 16 * WIDE <= largest < 4 * tokens * WIDE / 4


@pytest.mark.parametrize("family", ["llama", "minimax", "nemotron_h", "gpt_neox"])
def test_a_wrapped_model_with_tiles_equals_one_device(family: str) -> None:
    model = tiny_model(family)
    names = ("MLP", "SparseMoeBlock", "NemotronHMoE")
    tiled = [
        tile_tokens(module, tokens=8)
        for module in model.modules()
        if type(module).__name__.endswith(names)
    ]
    assert tiled
    parallelize(model, None)
    report = check_parity(model, shard(tiny_stream(model, (13, 1, 29, 7)), None))
    assert report.gradient_error > 0  # the reference ran the modules as they were
    unparallelize(model)
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("family", ["llama", "qwen3", "mixtral", "granitemoehybrid", "mamba2"])
def test_all_of_a_model_s_layers_are_tiled(family: str) -> None:
    model = tiny_model(family)
    tile_layers(model, tokens=8)
    tiled = [type(module).__name__ for module in model.modules() if "forward" in module.__dict__]
    layers = model.config.num_hidden_layers
    assert sum(name.endswith("Norm") for name in tiled) >= layers + 1  # the last norm too
    assert family == "mamba2" or sum(not name.endswith("Norm") for name in tiled) >= layers
    parallelize(model, None)
    check_parity(model, shard(tiny_stream(model, (13, 1, 29, 7)), None))


class _Pair(nn.Module):
    def forward(self, hidden: Tensor) -> tuple[Tensor, None]:
        return hidden, None


def test_what_cannot_be_tiled_is_refused() -> None:
    with pytest.raises(LayoutError, match="at least one token, got 0"):
        tile_tokens(_mlp(), tokens=0)
    with pytest.raises(UnsupportedModelError, match="masks would differ"):
        tile_tokens(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)))
    with pytest.raises(UnsupportedModelError, match="by transformers' names"):
        tile_layers(_mlp())
    with pytest.raises(UnsupportedModelError, match="it returned tuple"):
        tile_tokens(_Pair(), tokens=2)(torch.zeros(1, 5, 4))
