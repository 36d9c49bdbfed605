"""Which recorded call a call of `state_attention` repeats: a few look-ups, nothing decided anew."""

from __future__ import annotations

import weakref
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar.kernels.recorded_call import RecordedCall
from seqpar.layout import SequenceLayout

__all__ = ["recorded_call"]

_MOST_CALLS = 256
_CALLS: MutableMapping[ProcessGroup, dict[Any, _Known]] = weakref.WeakKeyDictionary()
"""By group, for as long as it lives: its calls by what they depend on."""


@dataclass(frozen=True)
class _Known:
    """A kind of call. Its key names layout and fixed decay by `id`, which holds while they live."""

    layout: SequenceLayout
    log_decay: Callable[[], Tensor | None]
    call: RecordedCall


def recorded_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    layout: SequenceLayout,
    group: ProcessGroup,
    options: tuple[Any, ...],
) -> RecordedCall | None:
    """The calls of this kind; None for tensors that the general path would copy.

    A fixed decay is part of the kind, in its present version: what is sent depends on its values.
    """
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return None
    decay: tuple[Any, ...] = ()
    fixed = None
    if log_decay is not None:
        if log_decay.is_inference():
            return None
        if log_decay.data_ptr() % 16:
            return None
        decay = (log_decay.shape, log_decay.stride(), log_decay.dtype, log_decay.requires_grad)
        if log_decay.ndim == 1:
            fixed = log_decay
            decay += (id(fixed), fixed._version)
    with_grad = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or (decay != () and decay[3])
    )
    key = (
        id(layout), options, decay, with_grad, q.device,
        q.shape, q.stride(), q.dtype, k.shape, k.stride(), k.dtype, v.shape, v.stride(), v.dtype,
    )  # fmt: skip
    calls = _CALLS.get(group)
    if calls is None:
        calls = _CALLS[group] = {}
    known = calls.get(key)
    if known is not None and known.layout is layout and known.log_decay() is fixed:
        return known.call
    if len(calls) >= _MOST_CALLS:
        calls.clear()
    call = RecordedCall(with_grad=with_grad)
    calls[key] = _Known(layout, (lambda: None) if fixed is None else weakref.ref(fixed), call)
    return call
