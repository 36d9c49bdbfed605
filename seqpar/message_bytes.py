"""Tensors as bytes on the wire, so that any dtype goes over any backend.

A backend that moves host memory only is handed copies there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar.process_groups import on_host

__all__ = ["bytes_of", "from_bytes", "landing_bytes", "outgoing_bytes"]


def bytes_of(x: Tensor) -> Tensor:
    """A contiguous tensor's own memory as uint8, flat."""
    flat = x.view(-1)
    if flat.stride(0) != 1:  # a single element may have any stride
        flat = flat.as_strided((1,), (1,))
    return flat.view(torch.uint8)


def outgoing_bytes(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The tensor's bytes, uint8 and flat, where the backend can read them."""
    message = x.detach().contiguous()
    return bytes_of(message.cpu() if on_host(group) else message)


def landing_bytes(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """Where bytes for x can land: x's own memory if the backend can write there."""
    assert x.is_contiguous(), "a receive buffer must be contiguous"
    flat = bytes_of(x.detach())
    return torch.empty_like(flat, device="cpu") if on_host(group) and x.is_cuda else flat


def from_bytes(message: Tensor, shape: Sequence[int], like: Tensor) -> Tensor:
    """Bytes back to a tensor of the given shape, with `like`'s dtype and device."""
    if message.storage_offset() % like.element_size():
        message = message.clone()
    return message.view(like.dtype).view(*shape).to(like.device)
