"""Torch's dense attention kernels behind one signature.

Legend: B batch, n query rows, m keys, H query heads, G key/value heads, D head dim.

A dense kernel attends n rows to m keys: all of them, or causally with n == m, or with an additive
bias [n, m] in which every row sees a key. Rows without keys never reach a kernel: what each
returns for them differs (0 or +inf as log-sum-exp), so the caller cuts them off.

| kernel    | devices, dtypes                    | causal | bias | GQA | log-sum-exp it returns   |
|-----------|------------------------------------|--------|------|-----|--------------------------|
| CpuFlash  | CPU; float64, float32, 16-bit      | yes    | yes  | yes | [B, H, n], strided       |
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["CpuFlash", "DenseKernel"]

_aten = torch.ops.aten


class DenseKernel(Protocol):
    """One kernel, forward and backward, on [B, n, H, D] and [B, m, G, D]."""

    @property
    def name(self) -> str: ...

    @property
    def head_dim_multiple(self) -> int: ...

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """out [B, n, H, D] in q's dtype, lse [B, n, H] in float32 (float64 for float64)."""

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk, dv with the shapes and dtypes of q, k, v."""


class CpuFlash:
    """torch's flash attention for CPU: the only fused CPU kernel with log-sum-exp and backward."""

    name = "cpu_flash"
    head_dim_multiple = 1

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *_by_head(q, k, v), 0.0, causal, attn_mask=bias, scale=scale
        )
        return out.transpose(1, 2), lse.transpose(1, 2)

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_by_head(dout, q, k, v, out), lse.transpose(1, 2), 0.0, causal,
            attn_mask=bias, scale=scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def _by_head(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, n, H, D] -> [B, H, n, D], views."""
    return tuple(x.transpose(1, 2) for x in tensors)
