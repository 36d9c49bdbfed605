"""Recorded steps again, with few host instructions: memory asked for at once, and the launches.

The host takes longer to decide what to launch than a device takes to compute some thousand tokens.
What it decided for one call holds for all calls of its kind, so here nothing is decided: what a
`Recorder` wrote down is launched again, on tensors at other addresses, in the same order.

An address is some bytes behind a base. Bases are, in order: what a call is handed, its results, the
room for what backward is given, the room that ends with the call, and 0 for what never moves.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqpar.kernels.direct_launch import TensorMaps
from seqpar.kernels.launch import Launch
from seqpar.kernels.recorder import Form, Place, Recorder, Step
from seqpar.traffic import Traffic

__all__ = ["Recording", "Room", "Saved", "Trace"]

_MAP_BYTES = 128
_ALIGNMENT = 256
Base = tuple[int, int]
"""A base's number, and the bytes behind it."""


class Result(NamedTuple):
    """A tensor that a call returns: contiguous, alone in its memory."""

    made: int
    shape: torch.Size
    dtype: torch.dtype


class Saved(NamedTuple):
    """A tensor that backward is given."""

    place: Place
    form: Form


@dataclass(frozen=True)
class Trace:
    """What a recorder wrote down, without the memory."""

    steps: list[Step]
    sizes: list[int]
    """Bytes of each piece of memory that the call asked for."""
    constants: list[Tensor]
    given: list[Form | None]
    """What the call was handed."""
    results: list[Result]
    saved: list[Saved | None]
    """What backward is given."""
    device: torch.device
    traffic: Traffic
    """What the call has counted."""

    @classmethod
    def of(
        cls, recorder: Recorder, results: Sequence[Tensor], saved: Sequence[Tensor | None] = ()
    ) -> Trace | None:
        """None, and the reason in the recorder, if it cannot be repeated."""
        found = [_result(recorder, x) for x in results]
        kept = [None if x is None else _saved(recorder, x, found) for x in saved]
        if not any(isinstance(step.action, Launch) for step in recorder.steps):
            recorder.problem = recorder.problem or "nothing is launched"
        for step in recorder.steps:
            if isinstance(step.action, Launch) and step.action.direct is None:
                recorder.problem = recorder.problem or "kernels are launched through Triton"
        if len({x.device for x in recorder.made}) > 1:
            recorder.problem = recorder.problem or "memory of several devices is asked for"
        if recorder.problem is not None:
            return None
        sizes = [x.untyped_storage().nbytes() for x in recorder.made]
        device = recorder.made[0].device
        return cls(
            steps=recorder.steps,
            sizes=sizes,
            constants=recorder.constants,
            given=recorder.forms,
            results=found,
            saved=kept,
            device=device,
            traffic=recorder.traffic,
        )


def _result(recorder: Recorder, x: Tensor) -> Result:
    place = recorder.place_of(x)
    whole = x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
    if place.source != "made" or not whole:
        recorder.problem = recorder.problem or "a result is not a tensor of its own"
    return Result(place.number, x.shape, x.dtype)


def _saved(recorder: Recorder, x: Tensor, results: Iterable[Result]) -> Saved:
    found = Saved(recorder.place_of(x), Form(x.shape, x.stride(), x.dtype))
    number = found.place.number
    if found.place.source == "given" and found.form != recorder.forms[number]:
        recorder.problem = (
            recorder.problem or "backward is given another view of what was handed in"
        )
    if found.place.source == "made" and any(number == result.made for result in results):
        recorder.problem = recorder.problem or "backward is given a result"
    return found


@dataclass(frozen=True)
class Room:
    """Pieces of memory in one: each at its own place, given when it is first asked for."""

    offsets: dict[int, int] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def offset_of(self, piece: int, size: int) -> int:
        """Where a piece of so many bytes lies."""
        if piece not in self.offsets:
            self.offsets[piece] = self.num_bytes
            self.sizes.append(-(-size // _ALIGNMENT) * _ALIGNMENT)
        return self.offsets[piece]

    @property
    def num_bytes(self) -> int:
        """Bytes of all pieces."""
        return sum(self.sizes)


@dataclass(frozen=True)
class _Where:
    """From the places of a trace to addresses."""

    trace: Trace
    kept: Room
    """What lies here backward is given; the rest lies in `scratch`."""
    scratch: Room = field(default_factory=Room)

    @property
    def first_room(self) -> int:
        """The number of the base of `kept`."""
        return len(self.trace.given) + len(self.trace.results)

    def __call__(self, place: Place) -> Base:
        if place.source == "given":
            return place.number, place.offset
        if place.source == "constant":
            return self.first_room + 2, self.trace.constants[place.number].data_ptr()
        for index, result in enumerate(self.trace.results):
            if result.made == place.number:
                return len(self.trace.given) + index, place.offset
        is_kept = place.number in self.kept.offsets
        room = self.kept if is_kept else self.scratch
        offset = room.offset_of(place.number, self.trace.sizes[place.number])
        return self.first_room + (not is_kept), offset + place.offset


class _Piece(NamedTuple):
    """A tensor of a step that is no launch."""

    base: int
    offset: int
    """Elements behind the base."""
    form: Form

    def of(self, bases: Sequence[Tensor | None]) -> Tensor:
        """The tensor."""
        whole, (shape, stride, dtype) = bases[self.base], self.form
        assert whole is not None
        if whole.dtype != dtype:  # a room, or a result: dense
            whole = whole.view(-1).view(dtype)
        return whole.as_strided(shape, stride, whole.storage_offset() + self.offset)


class _Act(NamedTuple):
    """A step that is no launch."""

    action: Callable[..., None]
    pieces: list[_Piece | Tensor]

    def __call__(self, bases: Sequence[Tensor | None]) -> None:
        self.action(*[x if isinstance(x, Tensor) else x.of(bases) for x in self.pieces])


class Recording:
    """The steps of a trace, to be run at other addresses.

    All launches read their parameters from one buffer, which is written once for a run.

    Args:
        kept: the pieces that backward is given.
    """

    def __init__(self, trace: Trace, kept: Room) -> None:
        self._trace = trace  # keeps constants and launches alive
        where = _Where(trace, kept)
        self._addresses: dict[Base, int] = {}
        self._maps: dict[tuple[int, TensorMaps], int] = {}
        found = [tuple(map(where, step.places)) for step in trace.steps]
        for step, places in zip(trace.steps, found, strict=True):
            self._enter(step, places)
        self._kept_bytes, self._scratch_bytes = where.kept.num_bytes, where.scratch.num_bytes
        self._format = struct.Struct(f"<{'128s' * len(self._maps)}{len(self._addresses)}Q")
        self._buffer = ctypes.create_string_buffer(self._format.size)
        self._lock, self._stream = threading.Lock(), -1
        self._configs: list[Any] = []
        self._steps: list[Any] = [
            self._launch(step.action, places)
            if isinstance(step.action, Launch)
            else (_act(trace, step, places), None, None, None)
            for step, places in zip(trace.steps, found, strict=True)
        ]
        launches = [x.action for x in trace.steps if isinstance(x.action, Launch)]
        self._any: Any = launches[0].direct

    def _enter(self, step: Step, places: tuple[Base, ...]) -> None:
        """Give a cell of the buffer to each address and each map that a launch reads."""
        if isinstance(step.action, Launch):
            assert step.action.direct is not None
            for place in places:
                self._addresses.setdefault(place, len(self._addresses))
            for position, maps in step.action.direct.maps:
                self._maps.setdefault((self._addresses[places[position]], maps), len(self._maps))

    def _launch(self, launch: Launch, places: tuple[Base, ...]) -> tuple[Any, int, Any, Any]:
        """The driver's function and what it takes."""
        direct = launch.direct
        assert direct is not None
        cells = [self._addresses[place] for place in places]
        base = ctypes.addressof(self._buffer)
        after = base + _MAP_BYTES * len(self._maps)
        parameters = direct.parameters(
            [base + _MAP_BYTES * self._maps[cells[i], maps] for i, maps in direct.maps],
            [after + 8 * cells[i] for i in direct.addresses],
        )
        self._configs.append(direct.new_config())
        return direct.launch, ctypes.addressof(self._configs[-1]), direct.function, parameters

    def run(
        self, given: Sequence[Tensor | None], addresses: list[int], traffic: Traffic | None
    ) -> tuple[list[Tensor], Tensor | None]:
        """Results, and the room of what backward is given.

        Args:
            given: what the call is handed.
            addresses: where that lies, 0 for None.
            traffic: where to count.
        """
        if traffic is not None:
            traffic.merge(self._trace.traffic)
        device = self._trace.device
        results = [torch.empty(x.shape, dtype=x.dtype, device=device) for x in self._trace.results]
        rooms = (_room(self._kept_bytes, device), _room(self._scratch_bytes, device))
        bases = addresses + [x.data_ptr() for x in results]
        bases += [0 if x is None else x.data_ptr() for x in rooms]
        bases.append(0)
        found = [bases[base] + offset for base, offset in self._addresses]
        maps = [each.at(found[index]) for index, each in self._maps]
        tensors = (*given, *results, *rooms)
        with self._lock:  # the buffer is this object's, whichever thread calls
            self._format.pack_into(self._buffer, 0, *maps, *found)
            self._follow_stream()
            for launch, config, function, parameters in self._steps:
                if parameters is None:
                    launch(tensors)
                elif status := launch(config, function, parameters, None):
                    raise RuntimeError(f"a recorded launch failed with CUDA error {status}")
        return results, rooms[0]

    def _follow_stream(self) -> None:
        """Launch on the current stream."""
        stream = self._any.stream
        if stream != self._stream:
            for config in self._configs:
                config.stream = stream
            self._stream = stream


def _room(num_bytes: int, device: torch.device) -> Tensor | None:
    """Memory; None if nothing lies in it."""
    return torch.empty(num_bytes, dtype=torch.uint8, device=device) if num_bytes else None


def _act(trace: Trace, step: Step, places: tuple[Base, ...]) -> _Act:
    pieces: list[_Piece | Tensor] = []
    for place, form, (base, offset) in zip(step.places, step.forms, places, strict=True):
        if place.source == "constant":
            pieces.append(trace.constants[place.number])
        else:
            pieces.append(_Piece(base, offset // form.dtype.itemsize, form))
    return _Act(step.action, pieces)
