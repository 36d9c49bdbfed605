"""Who takes part in the benchmark of lightning attention, and on which inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels.lightning import lightning_attention

__all__ = ["DIM", "Function", "decay_of", "make_inputs", "participants"]

DIM = 128
Function = Callable[..., Tensor]


def participants() -> dict[str, Function]:
    """By name: the function (q, k, v, decay, ...) -> o of everyone that is installed."""
    found: dict[str, Function] = {"seqpar": seqpar_function}
    if importlib.util.find_spec("fla"):
        found |= {"fla C=64": fla_function(64), "fla C=128": fla_function(128)}
    if importlib.util.find_spec("lightning_attn"):
        found["OpenNLPLab"] = opennlplab_function
    return found


def seqpar_function(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, **more: Any) -> Tensor:
    return lightning_attention(q, k, v, log_decay=decay, **more)[0]


def fla_function(chunk: int) -> Function:
    from fla.ops.simple_gla import chunk_simple_gla

    def run(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None, **more: Any) -> Tensor:
        per_token = decay is not None and decay.ndim == 3
        return chunk_simple_gla(
            q, k, v, scale=1.0, chunk_size=chunk,
            g=decay if per_token else None, g_gamma=None if per_token else decay, **more,
        )[0]  # fmt: skip

    return run


def opennlplab_function(q: Tensor, k: Tensor, v: Tensor, decay: Tensor | None) -> Tensor:
    from lightning_attn.ops import lightning_attn_func

    slopes = torch.zeros(q.shape[2], device=q.device) if decay is None else -decay
    return lightning_attn_func(
        *(x.transpose(1, 2).contiguous() for x in (q, k, v)), slopes
    ).transpose(1, 2)


def make_inputs(batch: int, tokens: int, heads: int) -> tuple[Tensor, ...]:
    """q, k, v and do: normal, bfloat16, q scaled."""
    shape = (batch, tokens, heads, DIM)
    q, k, v, do = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    return q * DIM**-0.5, k, v, do


def decay_of(kind: str, batch: int, tokens: int, heads: int) -> Tensor | None:
    """Log decays. "lightning": slopes 2^(-8h/H), Qin et al.; "token": log sigmoid of a normal
    number plus 4, [B, T, H]; "mean": fixed, each head at the mean of "token"; "none"."""
    if kind == "lightning":
        return -(2.0 ** (-8.0 * torch.arange(1, heads + 1, device="cuda") / heads)).float()
    if kind == "none":
        return None
    gates = torch.nn.functional.logsigmoid(torch.randn(batch, tokens, heads, device="cuda") + 4.0)
    return gates if kind == "token" else gates.mean((0, 1))
