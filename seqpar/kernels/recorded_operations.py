"""The few operations of torch that a recording repeats besides launches.

A call that takes or makes several states sets some of them to zero, and copies or joins others.
Each of these operations can be run again on tensors at other addresses, into memory that is there,
and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Operation", "operation_of"]


class Operation(NamedTuple):
    """One that torch has just done."""

    run: Callable[..., None]
    """Does it again, given like tensors for `tensors`."""
    tensors: tuple[Tensor, ...]
    """What it wrote, and what it read."""
    makes: bool
    """What it wrote is memory that it asked for."""


def operation_of(func: Any, args: Any, kwargs: Any, out: Any) -> Operation | None:
    """How to repeat what torch has done with `args`; None: it is not one of these operations."""
    found = _operation(func, args, kwargs, out)
    if found is None or not all(x.numel() for x in found.tensors):
        return None
    return found if len({x.device for x in found.tensors}) == 1 else None


def _operation(func: Any, args: Any, kwargs: Any, out: Any) -> Operation | None:
    match str(func):
        case "aten.copy_.default":
            return Operation(_copy, tuple(args[:2]), makes=False)
        case "aten.clone.default" | "aten._to_copy.default":
            return Operation(_copy, (out, args[0]), makes=True)
        case "aten.zero_.default":
            return Operation(_clear, (args[0],), makes=False)
        case "aten.zeros.default" | "aten.zeros_like.default" | "aten.new_zeros.default":
            return Operation(_clear, (out,), makes=True)
        case "aten.cat.default":
            return Operation(_joining(*args[1:], **kwargs), (out, *args[0]), makes=True)
        case _:
            return None


def _copy(to: Tensor, x: Tensor) -> None:
    to.copy_(x)


def _clear(x: Tensor) -> None:
    x.zero_()


def _joining(dim: int = 0) -> Callable[..., None]:
    def run(to: Tensor, *parts: Tensor) -> None:
        torch.cat(parts, dim, out=to)

    return run
