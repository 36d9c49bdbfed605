"""Torch's dense attention kernels behind one signature.

Legend: B batch, n query rows, m keys, H query heads, G key/value heads, D head dim.

A dense kernel attends n rows to m keys: all of them, or causally with n == m, or with an additive
bias [n, m] in which every row sees a key. Rows without keys never reach a kernel: what each
returns for them differs (0 or +inf as log-sum-exp), so the caller cuts them off.

| kernel    | devices, dtypes               | causal | bias | GQA | log-sum-exp it returns     |
|-----------|-------------------------------|--------|------|-----|----------------------------|
| CpuFlash  | CPU; float64, float32, 16-bit | yes    | yes  | yes | [B, H, n], strided         |
| Cudnn     | CUDA; 16-bit, D <= 128        | yes    | no   | yes | [B, H, n] or [B, H, n, 1]  |
| Efficient | CUDA; float32, 16-bit         | yes    | yes  | no  | [B, H, n rounded up to 32] |
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from seqpar.ops.softmax_operands import Operands

__all__ = ["CpuFlash", "Cudnn", "DenseKernel", "Efficient"]

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
        self, x: Operands, *, causal: bool, bias: Tensor | None, scale: float
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
        self, x: Operands, *, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *_by_head(x.dout, x.q, x.k, x.v, x.out), x.lse.transpose(1, 2), 0.0, causal,
            attn_mask=bias, scale=scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class Cudnn:
    """cuDNN's fused attention: on Hopper nearly twice as fast as FlashAttention-2.

    torch keeps cuDNN's plans, each made in about 80 ms, by the shapes and strides of q, k and v.
    Two consequences. The stride of a batch of one, which follows from how many tokens the rank
    holds, is replaced by that of a tensor standing alone, or each new length would be planned anew.
    And q, out and out's gradient have the same strides or are made contiguous: only q's are part of
    the key, and a plan reused for others would give wrong gradients.
    """

    name = "cudnn"
    head_dim_multiple = 8

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        assert bias is None
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
            *_by_head(*_alone(q, k, v)), None, True, 0.0, causal, False, scale=scale
        )
        return out.transpose(1, 2), lse.view(lse.shape[:3]).transpose(1, 2)

    def backward(
        self, x: Operands, *, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert bias is None
        stats = x.lse.transpose(1, 2).contiguous()
        stats = stats[..., None] if _cudnn_lse_ndim(x.q.device) == 4 else stats
        unused = torch.empty(1, dtype=torch.int64, device=x.q.device)  # the state of a dropout
        dout, q, out = _alike(x.dout, x.q, x.out)
        operands = _by_head(*_alone(dout, q, x.k, x.v, out))
        dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
            *operands, stats, unused, unused, None, None, None,
            x.q.shape[1], x.k.shape[1], 0.0, causal, scale=scale,
        )  # fmt: skip
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


class Efficient:
    """torch's memory-efficient attention: CUDA's way to float32, to a bias and to long heads."""

    name = "efficient"
    head_dim_multiple = 8

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        per_group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(per_group, 2) for x in (k, v))
        out, lse, *_ = _aten._efficient_attention_forward(
            q, k, v, _aligned(bias, q), None, None, q.shape[1], k.shape[1], 0.0,
            int(causal), True, scale=scale,
        )  # fmt: skip
        return out, lse[:, :, : q.shape[1]].transpose(1, 2)

    def backward(
        self, x: Operands, *, causal: bool, bias: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv_heads, per_group = x.k.shape[2], x.q.shape[2] // x.k.shape[2]
        k, v = (y.repeat_interleave(per_group, 2) for y in (x.k, x.v))
        padding = -x.q.shape[1] % 32
        stats = F.pad(x.lse.transpose(1, 2), (0, padding), value=torch.inf).contiguous()
        unused = torch.zeros((), dtype=torch.int64, device=k.device)
        dq, dk, dv, _ = _aten._efficient_attention_backward(
            x.dout, x.q, k, v, _aligned(bias, x.q), x.out.contiguous(), None, None,
            x.q.shape[1], k.shape[1], stats, 0.0, unused, unused, int(causal), False, scale=scale,
        )  # fmt: skip
        dk, dv = (
            y.unflatten(2, (kv_heads, per_group)).sum(3, dtype=torch.float32).to(y.dtype)
            for y in (dk, dv)
        )
        return dq, dk, dv


def _aligned(bias: Tensor | None, q: Tensor) -> Tensor | None:
    """The bias [n, m] as [B, H, n, m], its rows at multiples of 16 bytes."""
    if bias is None:
        return None
    num_keys = bias.shape[-1]
    padded = F.pad(bias, (0, -num_keys % 8))
    return padded[:, :num_keys].expand(q.shape[0], q.shape[2], *bias.shape)


@lru_cache(maxsize=8)
def _cudnn_lse_ndim(device: torch.device) -> int:
    """Torch releases return cuDNN's log-sum-exp with or without a last dim of 1; ask this one."""
    x = torch.zeros(1, 1, 64, 64, dtype=torch.bfloat16, device=device)
    lse: Tensor = _aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1]
    return lse.ndim


def _alike(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors if their strides are the same, else contiguous ones."""
    same = len({x.stride() for x in tensors}) == 1
    return tensors if same else tuple(x.contiguous() for x in tensors)


def _alone(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Views in which the stride of a batch of one is what it is in a tensor of this size."""
    return tuple(x[0].unsqueeze(0) if x.shape[0] == 1 else x for x in tensors)


def _by_head(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, n, H, D] -> [B, H, n, D], views."""
    return tuple(x.transpose(1, 2) for x in tensors)
