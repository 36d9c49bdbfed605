"""What no kernel takes: what is no dense tensor, or not of the shape, dtype and device asked."""

from __future__ import annotations

import torch
from torch import Tensor

from seqpar.errors import KernelInputError

__all__ = ["check_dense", "check_like", "check_tensors"]


def check_tensors(**given: object) -> None:
    """Refuse what is no tensor, or one without a layout: numbers, lists, arrays, nested tensors.

    Raises:
        KernelInputError: its name, what it is, and what to pass.
    """
    for name, x in given.items():
        if not isinstance(x, Tensor) or x.is_nested:
            kind = "a nested tensor" if isinstance(x, Tensor) else f"of type {type(x).__name__}"
            raise KernelInputError(f"{name} is {kind}; pass a dense tensor")


def check_like(
    name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Refuse a tensor that is not of this shape, dtype and device, or not dense.

    Raises:
        KernelInputError: what does not fit, its value, and what would.
    """
    check_tensors(**{name: x})
    if x.shape != shape:
        raise KernelInputError(f"{name} has shape {tuple(x.shape)}, but these inputs need {shape}")
    if x.dtype != dtype:
        raise KernelInputError(f"{name} has dtype {x.dtype}; cast it to {dtype}")
    if x.device != device:
        raise KernelInputError(f"{name} is on {x.device}, the keys are on {device}; move one")
    check_dense(name, x.layout)


def check_dense(name: str, layout: torch.layout) -> None:
    """Refuse sparse tensors.

    Raises:
        KernelInputError: its name, its layout, and what to pass.
    """
    if layout != torch.strided:
        raise KernelInputError(f"{name} has layout {layout}; pass it dense: to_dense()")
