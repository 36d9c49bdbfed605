"""Softmax attention over a whole stream in float64, with the mask written out pair by pair."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference", "visible"]


def visible(
    cu_seqlens: tuple[int, ...],
    *,
    causal: bool,
    window: int | None,
    key_cu_seqlens: tuple[int, ...] | None = None,
) -> Tensor:
    """bool [N, M]: whether query i sees key j."""
    documents, positions = _placed(cu_seqlens)
    key_documents, key_positions = _placed(key_cu_seqlens or cu_seqlens)
    distance = positions[:, None] - key_positions
    sees = documents[:, None] == key_documents
    if causal:
        sees &= distance >= 0
    if window is not None:
        sees &= distance.abs() < window
    return sees


def reference(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, sees: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, dq, dk, dv in float64 of [B, N, H|G, K|V]; a row that sees nothing gives zeros."""
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    group = q.shape[2] // k.shape[2]
    keys, values = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bihk,bjhk->bhij", q, keys) * scale
    weights = scores.masked_fill(~sees, -torch.inf).softmax(-1)
    weights = torch.where(sees.any(-1)[:, None], weights, 0.0)
    out = torch.einsum("bhij,bjhv->bihv", weights, values)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout.double())
    return out.detach(), dq, dk, dv


def _placed(cu_seqlens: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    bounds = torch.tensor(cu_seqlens)
    documents = torch.repeat_interleave(torch.arange(len(bounds) - 1), bounds.diff())
    return documents, torch.arange(int(bounds[-1])) - bounds[documents]
