"""What the lightning kernels can take; everything else is refused here, before any launch."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.errors import KernelInputError

__all__ = [
    "LOWEST_LOG_DECAY",
    "MAX_DIM",
    "Spec",
    "check_decays",
    "check_inputs",
    "state_dtype",
]

MAX_DIM = 256
"""The largest key or value dim."""

LOWEST_LOG_DECAY = -100.0
"""What is less acts as this: exp gives 4e-44, a reset, -inf included, without inf - inf."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Spec(NamedTuple):
    """What is checked of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool = False


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States are float32; float64 inputs (for checking gradients, on CPU) keep float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_inputs(
    keys: Spec,
    values: Spec,
    *,
    queries: Spec | None = None,
    output_grads: Spec | None = None,
    log_decay: Spec | None,
    bounds: tuple[int, torch.dtype, tuple[int, ...]] | None,
) -> None:
    """Refuse tensors that do not fit together. `bounds`: dims, dtype and values of cu_seqlens.

    Raises:
        KernelInputError: what does not fit, its value, and what would.
    """
    _check_pair(keys, values)
    for name, other, like in (("q", queries, keys), ("do", output_grads, values)):
        if other is None:
            continue
        if other.shape != like.shape:
            raise KernelInputError(
                f"{name} has shape {tuple(other.shape)}, but needs {tuple(like.shape)}: q is "
                f"shaped like k, do like v"
            )
        _check_same_kind(other, keys)
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


def _check_pair(keys: Spec, values: Spec) -> None:
    if len(keys.shape) != 4 or len(values.shape) != 4 or keys.shape[:3] != values.shape[:3]:
        raise KernelInputError(
            f"inputs must be [B, T, H, K] and [B, T, H, V] with equal B, T, H; "
            f"got {tuple(keys.shape)} and {tuple(values.shape)}"
        )
    for name, dim in (("key", keys.shape[3]), ("value", values.shape[3])):
        if not 1 <= dim <= MAX_DIM:
            raise KernelInputError(f"{name} dim is {dim}; it must be between 1 and {MAX_DIM}")
    if keys.dtype not in _DTYPES:
        raise KernelInputError(f"dtype {keys.dtype} is not one of {_DTYPES}")
    _check_same_kind(values, keys)


def _check_same_kind(other: Spec, keys: Spec) -> None:
    if other.dtype != keys.dtype:
        raise KernelInputError(f"dtypes differ: {other.dtype} and {keys.dtype}; cast one of them")
    if other.device != keys.device:
        raise KernelInputError(f"devices differ: {other.device} and {keys.device}; move one")


def _check_log_decay(log_decay: Spec, keys: Spec) -> None:
    batch, tokens, heads, _ = keys.shape
    if tuple(log_decay.shape) not in ((heads,), (batch, tokens, heads)):
        raise KernelInputError(
            f"log_decay has shape {tuple(log_decay.shape)}; it must be [H] = ({heads},) or "
            f"[B, T, H] = ({batch}, {tokens}, {heads})"
        )
    if log_decay.dtype not in (torch.float32, torch.float64):
        raise KernelInputError(f"log_decay has dtype {log_decay.dtype}; it must be float32")
    if log_decay.device != keys.device:
        raise KernelInputError(f"log_decay is on {log_decay.device}, the keys on {keys.device}")
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
