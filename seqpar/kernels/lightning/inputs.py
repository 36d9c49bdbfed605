"""What the lightning kernels can take; everything else is refused here, before any launch."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.errors import KernelInputError
from seqpar.kernels.tensors import check_dense, check_tensors

__all__ = [
    "LOWEST_LOG_DECAY",
    "MAX_DIM",
    "Spec",
    "bounds_of",
    "check_decays",
    "check_inputs",
    "state_dtype",
]

MAX_DIM = 256
"""The largest key or value dim."""

_MAX_TOKENS = 1 << 29
"""Of all rows: places in the tables of decays, three numbers a token, are counted in int32."""

LOWEST_LOG_DECAY = -100.0
"""What is less acts as this: exp gives 4e-44, a reset, -inf included, without inf - inf."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Spec(NamedTuple):
    """What is checked of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout
    requires_grad: bool = False


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States are float32; float64 inputs (for checking gradients, on CPU) keep float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bounds_of(cu_seqlens: Tensor) -> tuple[int, torch.dtype, tuple[int, ...]]:
    """Dims, dtype and values of cu_seqlens, which a copy from a CUDA device waits for.

    Raises:
        KernelInputError: it is no tensor, or one without values.
    """
    check_tensors(cu_seqlens=cu_seqlens)
    if cu_seqlens.is_meta:
        raise KernelInputError("cu_seqlens is on meta and has no values; pass it on the CPU")
    return cu_seqlens.ndim, cu_seqlens.dtype, tuple(cu_seqlens.flatten().tolist())


def check_inputs(
    keys: Spec,
    values: Spec,
    *,
    names: tuple[str, str] = ("k", "v"),
    queries: Spec | None = None,
    output_grads: Spec | None = None,
    log_decay: Spec | None,
    bounds: tuple[int, torch.dtype, tuple[int, ...]] | None,
) -> None:
    """Refuse tensors that do not fit together.

    `names` are those of keys and values; `bounds`: dims, dtype and values of cu_seqlens.

    Raises:
        KernelInputError: what does not fit, its value, and what would.
    """
    _check_pair(keys, values, names)
    for name, other, like in (("q", queries, keys), ("do", output_grads, values)):
        if other is None:
            continue
        if other.shape != like.shape:
            raise KernelInputError(
                f"{name} has shape {tuple(other.shape)}, but needs {tuple(like.shape)}: q is "
                f"shaped like k, do like v"
            )
        _check_same_kind(name, other, names[0], keys)
    if log_decay is not None:
        _check_log_decay(log_decay, keys)
    if bounds is not None:
        _check_bounds(*bounds, keys)


def check_decays(log_decay: Tensor) -> None:
    """Refuse log decays over 0: a decay itself, say, or a slope without its sign.

    Raises:
        KernelInputError: the largest, and what to pass.
    """
    if log_decay.numel() and (largest := float(log_decay.detach().max())) > 0:
        raise KernelInputError(
            f"log_decay reaches {largest:g}, but a decay is at most 1, its logarithm at most 0: "
            "pass natural logarithms of decays"
        )


def _check_pair(keys: Spec, values: Spec, names: tuple[str, str]) -> None:
    if len(keys.shape) != 4 or len(values.shape) != 4 or keys.shape[:3] != values.shape[:3]:
        raise KernelInputError(
            f"{names[0]} and {names[1]} must be [B, T, H, K] and [B, T, H, V] with equal B, T, H; "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    for name, of, dim in (("key", names[0], keys.shape[3]), ("value", names[1], values.shape[3])):
        if not 1 <= dim <= MAX_DIM:
            raise KernelInputError(
                f"the {name} dim of {of} is {dim}; it must be between 1 and {MAX_DIM}"
            )
    if keys.shape[0] * keys.shape[1] > _MAX_TOKENS:
        raise KernelInputError(
            f"B * T is {keys.shape[0] * keys.shape[1]} tokens, one call takes {_MAX_TOKENS}: call "
            "in parts, the final state of one the initial state of the next"
        )
    if keys.dtype not in _DTYPES:
        allowed = ", ".join(str(dtype) for dtype in _DTYPES)
        raise KernelInputError(f"{names[0]} has dtype {keys.dtype}; cast it to one of {allowed}")
    check_dense(names[0], keys.layout)
    _check_same_kind(names[1], values, names[0], keys)


def _check_same_kind(name: str, other: Spec, keys_name: str, keys: Spec) -> None:
    if other.dtype != keys.dtype:
        raise KernelInputError(
            f"dtypes differ: {name} is {other.dtype}, {keys_name} is {keys.dtype}; cast one of them"
        )
    if other.device != keys.device:
        raise KernelInputError(
            f"devices differ: {name} is on {other.device}, {keys_name} on {keys.device}; move one"
        )
    check_dense(name, other.layout)


def _check_log_decay(log_decay: Spec, keys: Spec) -> None:
    batch, tokens, heads, _ = keys.shape
    if tuple(log_decay.shape) not in ((heads,), (batch, tokens, heads)):
        raise KernelInputError(
            f"log_decay has shape {tuple(log_decay.shape)}; it must be [H] = ({heads},) or "
            f"[B, T, H] = ({batch}, {tokens}, {heads})"
        )
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise KernelInputError(
            f"log_decay has dtype {log_decay.dtype}; it must be float32: cast it"
        )
    if log_decay.device != keys.device:
        raise KernelInputError(
            f"log_decay is on {log_decay.device}, the keys are on {keys.device}; move one"
        )
    check_dense("log_decay", log_decay.layout)
    if len(log_decay.shape) == 1 and log_decay.requires_grad:
        raise KernelInputError(
            "log_decay [H] is a constant and gets no gradient; for a learned decay pass it per "
            "token: log_decay.expand(B, T, H); for a constant log_decay.detach()"
        )


def _check_bounds(dims: int, dtype: torch.dtype, bounds: tuple[int, ...], keys: Spec) -> None:
    batch, tokens = keys.shape[:2]
    if batch != 1:
        raise KernelInputError(f"cu_seqlens packs documents into one row: B must be 1, is {batch}")
    if dims != 1 or dtype not in (torch.int32, torch.int64):
        raise KernelInputError(f"cu_seqlens must be int32 [S + 1], is {dtype} of {dims} dims")
    if not bounds or bounds[0] != 0 or bounds[-1] != tokens:
        found = f"it runs from {bounds[0]} to {bounds[-1]}" if bounds else "it is empty"
        raise KernelInputError(f"cu_seqlens must run from 0 to T = {tokens}; {found}")
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        if stop <= start:
            raise KernelInputError(
                f"cu_seqlens must increase, document {index} is {start}:{stop}: leave it out"
            )
