"""The one tolerance table: how far a result may be from its float64 reference.

Errors are relative in norm, ‖out − ref‖ / ‖ref‖ (`relative_error`), and per token: the worst
token's ‖out_t − ref_t‖ over the largest token norm (`worst_token_error`), so that one wrong token
among thousands turns a test red.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
"""Forward and gradients of one operator, by input dtype."""

WORST_TOKEN = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 8e-3}
"""The worst single token."""

MODEL_LOSS = 1e-5
"""Relative error of a whole model's loss in float32, any degree, layout and strategy."""

MODEL_GRADIENT = 1e-4
"""Relative error of every parameter's gradient of a whole model in float32."""


def relative_error(out: Tensor, ref: Tensor) -> float:
    """‖out − ref‖ / ‖ref‖ in float64; infinite if `out` holds a NaN; 0 for two zeros."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    assert out.shape == ref.shape, f"{tuple(out.shape)} is not {tuple(ref.shape)}"
    if not torch.isfinite(out).all():
        return float("inf")
    difference, size = (out - ref).norm().item(), ref.norm().item()
    return difference / size if size else difference


def worst_token_error(out: Tensor, ref: Tensor, *, dim: int = 1) -> float:
    """max over tokens of ‖out_t − ref_t‖, over the largest ‖ref_t‖; tokens lie on `dim`."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    if not torch.isfinite(out).all():
        return float("inf")
    if out.numel() == 0:
        return 0.0
    difference = (out - ref).movedim(dim, 0).flatten(1).norm(dim=1).max().item()
    size = ref.movedim(dim, 0).flatten(1).norm(dim=1).max().item()
    return difference / size if size else difference


def assert_close(
    out: Tensor, ref: Tensor, *, what: str, dtype: torch.dtype | None = None, dim: int = 1
) -> None:
    """Assert both tolerances of the table for the dtype (by default the output's own)."""
    dtype = out.dtype if dtype is None else dtype
    relative, worst = relative_error(out, ref), worst_token_error(out, ref, dim=dim)
    assert relative <= RELATIVE[dtype], f"{what}: relative error {relative:.2e}"
    assert worst <= WORST_TOKEN[dtype], f"{what}: worst token {worst:.2e}"
