"""Per-token modules run by tiles of tokens, so that their intermediate results never exist whole.

At long sequences an MLP's intermediate tensors are the largest thing that a recomputed layer
holds: for a Llama of hidden size E and intermediate size 4E, 16E numbers a token against the 2E
of its input and output. An MLP treats every token by itself, so a tile of tokens at a time gives
the same result (Arctic Long Sequence Training, arXiv 2506.13996, section 3.3). It costs one more
forward of the module in each step.

Shape letters: B batch, T tokens of this rank, E hidden size.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from seqpar.adapters.wrapping import replace_forward
from seqpar.errors import LayoutError, UnsupportedModelError

__all__ = ["tile_layers", "tile_tokens"]

M = TypeVar("M", bound=nn.Module)


_PER_TOKEN = ("MLP", "MoE", "SparseMoeBlock", "RMSNorm", "LayerNorm")
_NORMS = ("RMSNorm", "LayerNorm")


def tile_layers(model: M, *, tokens: int = 4096) -> M:
    """`tile_tokens` for the MLPs, the experts and the norms of a Hugging Face model.

    transformers' norms compute in fp32: recomputed whole, a layer's two hold 8 times its input.

    Args:
        model: changed in place, before `parallelize`; its classes are named as transformers names
            them (...MLP, ...MoE, ...SparseMoeBlock, ...RMSNorm, LayerNorm).
        tokens: of a tile.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: no such module, or one with dropout.
    """
    found = [child for parent in model.modules() for child in _per_token_children(parent)]
    if not found:
        raise UnsupportedModelError(
            type(model).__name__,
            "none of its layers has an MLP or a norm by transformers' names",
            "call tile_tokens on the modules that treat every token by itself",
        )
    for module in found:
        tile_tokens(module, tokens=tokens)
    return model


def _per_token_children(parent: nn.Module) -> list[nn.Module]:
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(parent, GradientCheckpointingLayer):
        names: tuple[str, ...] = _PER_TOKEN
    elif isinstance(parent, PreTrainedModel) or type(parent).__name__.endswith("Attention"):
        names = _NORMS  # the last norm; norms of queries and keys
    else:
        return []
    return [child for child in parent.children() if type(child).__name__.endswith(names)]


def tile_tokens(module: M, *, tokens: int = 4096) -> M:
    """Run a module that treats every token by itself by tiles of tokens.

        for layer in model.model.layers:
            seqpar.tile_tokens(layer.mlp)

    `tile_layers` does so for all such modules of a Hugging Face model.
    Forward keeps the input only; backward computes each tile again, and sums the gradients of the
    module's parameters over tiles in fp32. `unparallelize` undoes it.

    Args:
        module: changed in place. Its forward takes [B, T, E] and returns as many tokens: an MLP,
            a block of experts. Whether it mixes tokens is not seen here: `check_parity` compares
            with the module as it was.
        tokens: of a tile, at least 1.

    Returns:
        The same module.

    Raises:
        LayoutError: no token in a tile.
        UnsupportedModelError: the module draws dropout masks, which computing again would change;
            or, when it is called, it does not return one tensor with its input's tokens.
    """
    if tokens < 1:
        raise LayoutError(f"a tile holds at least one token, got {tokens}")
    name = type(module).__name__
    if any(isinstance(part, nn.Dropout) and part.p > 0 for part in module.modules()):
        raise UnsupportedModelError(
            name, "computed again, its dropout masks would differ", "build it without dropout"
        )

    def tiled(self: nn.Module, hidden: Tensor, *, original: Any) -> Tensor:
        if hidden.shape[1] <= tokens:
            whole: Tensor = original(hidden)
            return whole
        parameters = [p for p in self.parameters() if p.requires_grad]
        output: Tensor = _Tiled.apply(hidden, original, tokens, *parameters)  # type: ignore[no-untyped-call]
        return output

    replace_forward(module, tiled)
    return module


class _Tiled(torch.autograd.Function):
    """Saves [B, T, E]; backward runs forward and backward tile by tile."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, run: Any, tokens: int, *parameters: Tensor) -> Tensor:
        # Activation checkpointing would hand saved parameters back detached from the module's.
        ctx.run, ctx.tokens, ctx.parameters = run, tokens, parameters
        ctx.save_for_backward(hidden)
        ctx.autocast = _autocast_of(hidden.device.type)
        whole: Tensor | None = None
        for start in range(0, hidden.shape[1], tokens):
            tile = hidden[:, start : start + tokens]
            output = _checked(run(tile), tile, run)
            if whole is None:
                whole = output.new_empty(*hidden.shape[:2], *output.shape[2:])
            whole[:, start : start + tokens] = output
        assert whole is not None  # more tokens than a tile's
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,), parameters = ctx.saved_tensors, ctx.parameters
        grad_hidden = torch.empty_like(hidden)
        sums = [torch.zeros_like(p, dtype=_sum_dtype(p.dtype)) for p in parameters]
        tiles = (torch.split(x, ctx.tokens, 1) for x in (hidden, grad, grad_hidden))
        for tile, grad_tile, into in zip(*tiles, strict=True):
            leaf = tile.detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                output = ctx.run(leaf)
            found = torch.autograd.grad(output, [leaf, *parameters], grad_tile, allow_unused=True)
            into.copy_(found[0])
            for total, part in zip(sums, found[1:], strict=True):
                if part is not None:
                    total += part
        totals = (total.to(p.dtype) for total, p in zip(sums, parameters, strict=True))
        return (grad_hidden, None, None, *totals)


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _autocast_of(device_type: str) -> dict[str, Any]:
    return {
        "device_type": device_type,
        "dtype": torch.get_autocast_dtype(device_type),
        "enabled": torch.is_autocast_enabled(device_type),
    }


def _checked(output: Any, tile: Tensor, run: Any) -> Tensor:
    if isinstance(output, Tensor) and output.shape[:2] == tile.shape[:2]:
        return output
    shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise UnsupportedModelError(
        str(getattr(run, "__qualname__", run)),
        f"for tokens {tuple(tile.shape)} it returned {shape}",
        "tile modules that return one tensor of the same tokens",
    )
