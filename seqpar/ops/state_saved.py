"""Tensors out of frozen dataclasses and named tuples, and back.

What autograd is to keep, it must be handed.

A tensor that a Function keeps anywhere but in `save_for_backward` is not seen by activation
checkpointing and lives on.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

__all__ = ["put_tensors", "take_tensors"]


@dataclass(frozen=True)
class _Slot:
    """Where a tensor was taken from, and its place among those that were."""

    index: int


def take_tensors(value: Any, found: list[Tensor]) -> Any:
    """The value with a slot for each float tensor in it; they go to `found`, each once."""
    if isinstance(value, Tensor):
        if not value.is_floating_point():  # a table, kept by those who made it
            return value
        for index, other in enumerate(found):
            if other is value:
                return _Slot(index)
        found.append(value)
        return _Slot(len(found) - 1)
    changed = {}
    for name in _names(value.__class__):
        part = getattr(value, name)
        if part is not None and (emptied := take_tensors(part, found)) is not part:
            changed[name] = emptied
    return _changed(value, changed)


def put_tensors(value: Any, tensors: tuple[Tensor, ...]) -> Any:
    """The inverse of `take_tensors`."""
    if isinstance(value, _Slot):
        return tensors[value.index]
    changed = {}
    for name in _names(value.__class__):
        part = getattr(value, name)
        if part is not None and (filled := put_tensors(part, tensors)) is not part:
            changed[name] = filled
    return _changed(value, changed)


def _changed(value: Any, changed: dict[str, Any]) -> Any:
    if not changed:
        return value
    if isinstance(value, tuple):
        return value._replace(**changed)  # type: ignore[attr-defined]
    return replace(value, **changed)


@lru_cache(maxsize=256)
def _names(kind: Any) -> tuple[str, ...]:
    """Fields of a dataclass or a named tuple; none of anything else."""
    if issubclass(kind, tuple):
        return getattr(kind, "_fields", ())
    return tuple(field.name for field in fields(kind)) if is_dataclass(kind) else ()
