"""One device's attention over tiles: one face over torch's kernels, forward and backward.

Legend: B batch, T query tokens, S key tokens, H query heads, G key/value heads, K key dim,
V value dim.

`attend` adds the tiles' outputs and log-sum-exps to a `PartialOutput`; `attend_backward` adds their
gradients to `Gradients`. The backward is given the *merged* output and log-sum-exp, which makes
the sum over tiles and over devices exact: a kernel recomputes p = exp(s - lse), and of the output
it needs only rowsum(dout * out).

What the kernels return differs (layout, padding, the log-sum-exp of an empty row); here it does
not: lse is [B, T, H], natural, float32 (float64 for float64), -inf for a row without keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from seqpar.errors import KernelInputError
from seqpar.ops.softmax_dense import DenseBackend
from seqpar.ops.softmax_kernels import CpuFlash, Cudnn, Efficient
from seqpar.ops.softmax_operands import Operands, TileGradients, TileOutputs
from seqpar.ops.softmax_packed import FlashPacked
from seqpar.ops.softmax_partial import PartialOutput, RowSum
from seqpar.ops.softmax_split import SplitBackend
from seqpar.ops.softmax_tiles import Tile

__all__ = ["Backend", "Gradients", "attend", "attend_backward", "choose_backend"]


CUDA_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Backend(Protocol):
    """How a list of tiles is carried out: which kernels, how many launches."""

    @property
    def name(self) -> str: ...

    @property
    def head_dim_multiple(self) -> int:
        """K and V are padded with zeros to one common multiple of this."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, tiles: Sequence[Tile], *, scale: float
    ) -> TileOutputs: ...

    def backward(self, x: Operands, tiles: Sequence[Tile], *, scale: float) -> TileGradients: ...


@dataclass(frozen=True)
class Gradients:
    """The sums that a backward pass adds to."""

    dq: RowSum
    dk: RowSum
    dv: RowSum

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor) -> Gradients:
        return cls(RowSum(q), RowSum(k), RowSum(v))

    def for_keys(self, k: Tensor, v: Tensor) -> Gradients:
        """The same sum for the queries; new ones for another block of keys and values."""
        return Gradients(self.dq, RowSum(k), RowSum(v))


def attend(
    merged: PartialOutput,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tiles: Sequence[Tile],
    *,
    scale: float,
    backend: Backend | None = None,
) -> None:
    """Add softmax(scale q kᵀ) v over the tiles to `merged`.

    Args:
        q: [B, T, H, K]; k: [B, S, G, K]; v: [B, S, G, V], G divides H.
        backend: by default the fastest that is exact for these tensors and tiles.
    """
    if not tiles or not q.numel():
        return
    backend = backend or choose_backend(q, v)
    value_dim = v.shape[-1]
    q, k, v = _padded(backend.head_dim_multiple, q, k, v)
    for start, out, lse in backend.forward(q, k, v, tiles, scale=scale):
        merged.add(out[..., :value_dim], lse, start=start)


def attend_backward(
    grads: Gradients,
    x: Operands,
    tiles: Sequence[Tile],
    *,
    scale: float,
    backend: Backend | None = None,
    first_head: int = 0,
) -> None:
    """Add the tiles' part of the gradients to `grads`.

    Args:
        first_head: the first key/value head of `x` among those of `grads`.
    """
    if not tiles or not x.q.numel():
        return
    backend = backend or choose_backend(x.q, x.v)
    key_dim, value_dim = x.q.shape[-1], x.v.shape[-1]
    dout, q, k, v, out = _padded(backend.head_dim_multiple, *x[:-1])
    by_row, by_key = backend.backward(Operands(dout, q, k, v, out, x.lse), tiles, scale=scale)
    first_query_head = first_head * (x.q.shape[2] // x.k.shape[2])
    for row, dq in by_row:
        grads.dq.add(dq[..., :key_dim], start=row, head_start=first_query_head)
    for key, dk, dv in by_key:
        grads.dk.add(dk[..., :key_dim], start=key, head_start=first_head)
        grads.dv.add(dv[..., :value_dim], start=key, head_start=first_head)


def choose_backend(q: Tensor, v: Tensor) -> Backend:
    """The fastest backend that is exact for these tensors, chosen once for their kind.

    Raises:
        KernelInputError: a device or dtype that no fused kernel of torch takes.
    """
    key = (q.device, q.dtype, max(q.shape[-1], v.shape[-1]), _is_deterministic())
    return _choose(*key)


@lru_cache(maxsize=64)
def _choose(
    device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> Backend:
    if device.type == "cpu" and dtype in (*CUDA_DTYPES, torch.float64):
        return DenseBackend(CpuFlash())
    if device.type != "cuda" or dtype not in CUDA_DTYPES:
        raise KernelInputError(
            f"softmax attention has no fused kernel for {dtype} on {device.type}: use float32, "
            f"bfloat16 or float16 on CUDA, or the CPU, which takes float64 too"
        )
    if dtype == torch.float32 or head_dim > 256:
        return DenseBackend(Efficient())
    on_hopper = torch.cuda.get_device_capability(device) >= (9, 0)
    if on_hopper and head_dim <= 128 and not deterministic:
        return SplitBackend(DenseBackend(Cudnn()), FlashPacked())
    return FlashPacked()


def _is_deterministic() -> bool:
    """torch.use_deterministic_algorithms, without warn_only: cuDNN's backward adds in any order."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def _padded(multiple: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros after their last dim, up to one common multiple; that dim dense."""
    widest = max(x.shape[-1] for x in tensors)
    target = -(-widest // multiple) * multiple
    padded = (x if x.shape[-1] == target else F.pad(x, (0, target - x.shape[-1])) for x in tensors)
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in padded)
