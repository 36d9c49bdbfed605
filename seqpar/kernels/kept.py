"""What a repeated forward pass leaves to backward: tensor by tensor what the general path leaves.

Activation checkpointing runs a forward pass a second time and hands what that saves, in its order,
to the backward pass of the first. Either may be repeated and the other not, so both save the same
number of tensors, alike in shape and dtype and with the same contents, and either backward pass
takes each of them by itself, wherever it lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from seqpar.kernels.recorder import Form
from seqpar.kernels.recording import Room, Trace

__all__ = ["Fitting", "KeptTensors"]

_ALIGNMENT = 16


class _View(NamedTuple):
    """A tensor in the room."""

    form: Form
    start: int
    """Elements before it."""


class KeptTensors:
    """The tensors that a forward pass saves, as views of its room.

    Args:
        trace: of the forward pass.
    """

    def __init__(self, trace: Trace) -> None:
        self.room = Room()
        """The pieces of memory in which they lie."""
        self._constants: list[Tensor] = []
        self._views: list[_View] = []
        places = [self._enter(trace, index) for index in range(len(trace.saved))]
        starts = {"given": 0, "constant": len(trace.given)}
        starts["made"] = starts["constant"] + len(self._constants)
        end = starts["made"] + len(self._views)
        self._order = [end if x is None else starts[x[0]] + x[1] for x in places]
        self._dtypes = {view.form.dtype for view in self._views}

    def _enter(self, trace: Trace, index: int) -> tuple[str, int] | None:
        """A source, and the number among what is taken from there."""
        saved = trace.saved[index]
        if saved is None:
            return None
        source, number, offset = saved.place
        if source == "given":
            return source, number
        if source == "constant":
            self._constants.append(trace.constants[number])
            return source, len(self._constants) - 1
        offset += self.room.offset_of(number, trace.sizes[number])
        view = _View(saved.form, offset // saved.form.dtype.itemsize)
        if view not in self._views:
            self._views.append(view)
        return source, self._views.index(view)

    def __call__(self, given: Sequence[Tensor | None], room: Tensor | None) -> list[Tensor | None]:
        """The tensors, of a call that was handed `given` and has filled `room`."""
        whole = {} if room is None else {dtype: room.view(dtype) for dtype in self._dtypes}
        views = [
            whole[form.dtype].as_strided(form.shape, form.stride, start)
            for form, start in self._views
        ]
        found = [*given, *self._constants, *views, None]
        return [found[index] for index in self._order]


class Fitting:
    """Tensors with the strides of those that were recorded, at multiples of 16 bytes.

    Hooks on saved tensors, such as `save_on_cpu`, hand back a tensor that is dense whatever the one
    was that they took, and gradients come as they are made: these are copied.

    Args:
        forms: of the tensors that were recorded.
    """

    def __init__(self, forms: Sequence[Form | None]) -> None:
        self._forms = forms
        self._strides = [None if form is None else form.stride for form in forms]

    def __call__(
        self, tensors: Sequence[Tensor | None]
    ) -> tuple[list[int], Sequence[Tensor | None]]:
        """Addresses, 0 for None, and the tensors, which must live while they are used."""
        addresses = _addresses(tensors)
        strides = [None if x is None else x.stride() for x in tensors]
        if strides == self._strides and reduce(or_, addresses) % _ALIGNMENT == 0:
            return addresses, tensors
        fitting = [_fit(x, form) for x, form in zip(tensors, self._forms, strict=True)]
        return _addresses(fitting), fitting


def _addresses(tensors: Sequence[Tensor | None]) -> list[int]:
    return [0 if x is None else x.data_ptr() for x in tensors]


def _fit(x: Tensor | None, form: Form | None) -> Tensor | None:
    if x is None or form is None:
        return None
    if x.stride() == form.stride and x.data_ptr() % _ALIGNMENT == 0:
        return x
    copied = torch.empty_strided(form.shape, form.stride, dtype=form.dtype, device=x.device)
    return copied.copy_(x)
