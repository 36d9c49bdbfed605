"""What one call launches, and on which tensors: written down while it runs as it always does.

A call of a known kind launches the same kernels in the same order; only the addresses of its
tensors differ. A `Recorder` in force is told of every launch, and sees everything else that torch
does. What it has seen can be repeated (`seqpar.kernels.recording`) if it was launches, memory asked
for, views of it, the few `recorded_operations`, and nothing else; otherwise `problem` says what
else there was.

A tensor's place is its number among those that the caller names, or the piece of memory that it
lies in, in the order in which the call asked for them, and the bytes before it there.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from seqpar.kernels.recorded_operations import operation_of
from seqpar.traffic import Traffic, count_into, current_traffic

if TYPE_CHECKING:
    from seqpar.kernels.launch import Launch

__all__ = ["Form", "Place", "Recorder", "Step", "current_recorder", "lasting", "not_recorded"]

_ALLOCATIONS = ("aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty")


class Place(NamedTuple):
    """Where a tensor lies."""

    source: str
    """given, made or constant."""
    number: int
    offset: int = 0
    """Bytes."""


class Form(NamedTuple):
    """What a tensor is but for its address."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, x: Tensor | None) -> Form | None:
        """None for no tensor."""
        return None if x is None else cls(x.shape, x.stride(), x.dtype)


class Step(NamedTuple):
    """A launch, or a function that takes tensors, and where its tensors lie."""

    action: Launch | Callable[..., None]
    places: tuple[Place, ...]
    forms: tuple[Form, ...]


class Recorder(TorchDispatchMode):
    """Writes down what happens inside `with recorder:`.

    Args:
        given: tensors that the call is handed, which other calls will have elsewhere.
    """

    def __init__(self, given: Sequence[Tensor | None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.given = [(i, x.data_ptr()) for i, x in enumerate(given) if x is not None]
        self.forms = list(map(Form.of, given))
        self.steps: list[Step] = []
        self.made: list[Tensor] = []
        """All memory asked for; held, so that no address is given out twice."""
        self.constants: list[Tensor] = []
        """Tensors of neither kind, which must be `lasting`."""
        self.problem: str | None = None
        self._memory: dict[int, int] = {}
        self._inside_step = False
        self.traffic = Traffic()
        """What the call has counted."""
        self._exits = ExitStack()

    def __enter__(self) -> Recorder:
        outer = current_traffic()
        self._exits.enter_context(count_into(self.traffic))
        token = _RECORDER.set(self)
        self._exits.callback(_RECORDER.reset, token)
        if outer is not None:
            self._exits.callback(outer.merge, self.traffic)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._exits.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self._inside_step:
            return out
        if func._schema.name in _ALLOCATIONS:
            self._make(out)
        elif (done := operation_of(func, args, kwargs, out)) is not None:
            if done.makes:
                self._make(out)
            self._write_down(done.run, done.tensors)
        elif func._schema.is_mutable or not _is_view(out, args):
            self.problem = self.problem or f"{func} is neither a launch nor a view"
        return out

    def do(self, run: Callable[..., None], *tensors: Tensor, step: Launch | None = None) -> None:
        """Run `run(*tensors)`, and write it down: as a launch, or to be run with their like."""
        self._inside_step = True
        try:
            run(*tensors)
        finally:
            self._inside_step = False
        self._write_down(step or run, tensors)

    def _make(self, x: Tensor) -> None:
        """x is memory that the call has asked for."""
        self._memory[x.untyped_storage().data_ptr()] = len(self.made)
        self.made.append(x)

    def _write_down(self, action: Launch | Callable[..., None], tensors: Sequence[Tensor]) -> None:
        places = tuple(map(self.place_of, tensors))
        forms = tuple(Form(x.shape, x.stride(), x.dtype) for x in tensors)
        for place, form in zip(places, forms, strict=True):
            given = self.forms[place.number] if place.source == "given" else None
            if given is not None and given.dtype != form.dtype:
                self.problem = self.problem or "what is handed in is read as another dtype"
        self.steps.append(Step(action, places, forms))

    def place_of(self, x: Tensor) -> Place:
        """Where a tensor lies."""
        address = x.data_ptr()
        for index, start in self.given:
            if start == address:
                return Place("given", index)
        start = x.untyped_storage().data_ptr()
        if start in self._memory:
            return Place("made", self._memory[start], address - start)
        if x not in _LASTING:
            self.problem = self.problem or "a tensor is neither handed to the call nor made by it"
        self.constants.append(x)
        return Place("constant", len(self.constants) - 1)


_LASTING: MutableMapping[Tensor, bool] = WeakIdKeyDictionary()
_RECORDER: ContextVar[Recorder | None] = ContextVar("seqpar_recorder", default=None)


def not_recorded(what: str) -> None:
    """Say that something happens which a recorder does not see, so that it is not left out."""
    recorder = _RECORDER.get()
    if recorder is not None:
        recorder.problem = recorder.problem or what


def lasting(x: Tensor) -> Tensor:
    """x, which will be used at the same address by every call like the present one."""
    _LASTING[x] = True
    return x


def current_recorder() -> Recorder | None:
    """The recorder in force."""
    return _RECORDER.get()


def _is_view(out: Any, args: Any) -> bool:
    """Whether an operation gave nothing but views of its arguments.

    A number is none, nor is the work that a process group hands out for a message.
    """
    if not isinstance(out, Tensor | tuple | list):
        return False
    found = [out] if isinstance(out, Tensor) else list(out)
    taken = {x.untyped_storage().data_ptr() for x in args if isinstance(x, Tensor)}
    return all(isinstance(x, Tensor) and x.untyped_storage().data_ptr() in taken for x in found)
