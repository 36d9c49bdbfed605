"""Checkpoints of recomputed layers in the host's memory.

Activation checkpointing keeps each layer's input: for a Llama of L layers and hidden size E, 2LE
bytes a token in bf16, which at long sequences is most of what a step holds. A layer's input is
needed again only when its backward begins. Until then it can lie in pinned host memory: it leaves
beside the following layer's forward, and comes back beside the backward of the layer after it.
At long sequences attention, which is quadratic, hides both copies.

Source: Arctic Long Sequence Training, arXiv 2506.13996, section 3.3; the scheme is that of
`torch.autograd.graph.save_on_cpu`, with copies that no kernel waits for.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from seqpar.errors import UnsupportedModelError

__all__ = ["offload_checkpoints", "offloaded"]

M = TypeVar("M", bound=nn.Module)
_PIECE_BYTES = 1 << 25  # pinned memory is handed out in powers of two: pieces waste none


def offload_checkpoints(model: M, *, least_bytes: int = 1 << 20) -> M:
    """Keep the inputs of a Hugging Face model's recomputed layers in host memory.

        model.gradient_checkpointing_enable({"use_reentrant": False})
        seqpar.offload_checkpoints(model)

    Host memory of a rank: a layer's input for every layer, L * T * E * 2 bytes in bf16 for T
    tokens on the rank. `model.gradient_checkpointing_enable` and `_disable` undo it.

    Args:
        model: changed in place; its layers are recomputed already, without `use_reentrant`.
        least_bytes: smaller inputs stay on the device.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: no layer is recomputed, or by reentrant checkpointing, which saves
            its inputs by itself.
    """
    layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
    functions: list[Any] = [getattr(m, "_gradient_checkpointing_func", None) for m in layers]
    remedy = 'call model.gradient_checkpointing_enable({"use_reentrant": False}) before'
    if not any(functions):
        raise UnsupportedModelError(
            type(model).__name__, "none of its layers is recomputed", remedy
        )
    if any(getattr(f, "keywords", {}).get("use_reentrant") for f in functions):
        raise UnsupportedModelError(
            type(model).__name__, "reentrant checkpointing saves its inputs by itself", remedy
        )
    by_function = {f: offloaded(f, least_bytes=least_bytes) for f in functions if f is not None}
    for layer, function in zip(layers, functions, strict=True):
        if function is not None:
            layer.__dict__["_gradient_checkpointing_func"] = by_function[function]
    return model


def offloaded(checkpoint: Callable[..., Any], *, least_bytes: int = 1 << 20) -> Callable[..., Any]:
    """`torch.utils.checkpoint.checkpoint`, or one like it, with its inputs kept in host memory.

        recompute = seqpar.offload.offloaded(torch.utils.checkpoint.checkpoint)
        hidden = recompute(layer, hidden, use_reentrant=False)

    Use one for all layers of a model: it learns from the order of their forwards which input to
    fetch while a layer's backward runs.
    """
    chain = _Chain(least_bytes)

    @functools.wraps(checkpoint)
    def recompute(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        with saved_tensors_hooks(chain.park, _unpark):
            return checkpoint(function, *args, **options)

    return recompute


class _Chain:
    """Tensors in the order in which they were parked; no tensor is held by it."""

    def __init__(self, least_bytes: int) -> None:
        self._least_bytes = least_bytes
        self._last: weakref.ref[_Parked] | None = None
        self._side: dict[torch.device, torch.cuda.Stream] = {}

    def park(self, x: Tensor) -> Tensor | _Parked:
        if x.nbytes < self._least_bytes:
            return x
        side = None
        if x.is_cuda:
            side = self._side.get(x.device) or torch.cuda.Stream(x.device)  # type: ignore[no-untyped-call]
            self._side[x.device] = side
        parked = _Parked(x, side, self._last)
        self._last = weakref.ref(parked)
        return parked


class _Parked:
    """A tensor in host memory, or on its way back."""

    def __init__(
        self, x: Tensor, side: torch.cuda.Stream | None, before: weakref.ref[_Parked] | None
    ) -> None:
        self._shape, self._dtype, self._device = x.shape, x.dtype, x.device
        self._side, self._before = side, before
        self._arriving: tuple[Tensor, torch.cuda.Event | None] | None = None
        dense = x.detach().contiguous()
        with _beside(side, dense):
            self._pieces = [_on_host(part) for part in torch.split(_bytes(dense), _PIECE_BYTES)]

    def fetch(self) -> None:
        """Begin to bring it back, unless that has begun."""
        if self._arriving is not None:
            return
        room = torch.empty(self._shape, dtype=self._dtype, device=self._device)
        with _beside(self._side, room):
            parts = torch.split(_bytes(room), _PIECE_BYTES)
            for part, piece in zip(parts, self._pieces, strict=True):
                part.copy_(piece, non_blocking=True)
            event = self._side.record_event() if self._side is not None else None
        self._arriving = room, event

    def take(self) -> Tensor:
        """The tensor, for kernels launched from now on; the one parked before it sets out."""
        self.fetch()
        before = self._before() if self._before is not None else None
        if before is not None:
            before.fetch()
        assert self._arriving is not None
        (x, event), self._arriving = self._arriving, None
        if event is not None:
            torch.cuda.current_stream(x.device).wait_event(event)
        return x


def _unpark(kept: Tensor | _Parked) -> Tensor:
    return kept if isinstance(kept, Tensor) else kept.take()


def _on_host(part: Tensor) -> Tensor:
    piece = torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    return piece.copy_(part, non_blocking=True)


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


@contextmanager
def _beside(side: torch.cuda.Stream | None, x: Tensor) -> Iterator[None]:
    """Copies of x on the side stream, after all that the current one was given; on the CPU, now."""
    if side is not None:
        side.wait_stream(torch.cuda.current_stream(x.device))
        x.record_stream(side)
    with torch.cuda.stream(side):
        yield
