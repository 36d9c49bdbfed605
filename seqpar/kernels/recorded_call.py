"""A call that is decided once and then repeated, forward and backward.

A call of a kind runs as it is until one backward pass has ended (without gradients: once); the next
one is recorded; from then on it `is_ready`, and is repeated instead. The general path stays the
truth: what is repeated are its launches, in its order, on the same bits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.kernels.recorder import Recorder
from seqpar.kernels.recording import Recording, Room, Trace, Where
from seqpar.traffic import Traffic, current_traffic

__all__ = ["RecordedCall"]

_log = logging.getLogger(__name__)


class RecordedCall:
    """Forward and backward of one kind of call, recorded once and then repeated.

    The tensors of a call of one kind have the same shapes, strides, dtypes and device, and are as
    the general path takes them without a copy: at addresses that are multiples of 16 bytes.

    Args:
        with_grad: there is a backward pass.
        num_inputs: tensors that a call is handed; some may be None, always the same ones.
    """

    def __init__(self, *, with_grad: bool, num_inputs: int) -> None:
        self.with_grad, self.num_inputs = with_grad, num_inputs
        self.is_ready = False
        self._rounds = 0
        self._began_in, self._refused = 0, False
        self._forward: Recording | None = None
        self._backward: Recording | None = None
        self._has_gradient: list[bool] = []

    # -- recording, by the general path ---------------------------------------------------------

    def recorder(self, inputs: Sequence[Tensor | None]) -> Recorder | None:
        """What to run this call's forward pass in; None: as it is."""
        addresses = [x.data_ptr() for x in inputs if x is not None]
        alone = len(set(addresses)) == len(addresses)
        if self.is_ready or self._refused or not alone or self._began_in == self._rounds:
            return None
        self._began_in = self._rounds
        return Recorder(inputs)

    def forward_ended(
        self, recorder: Recorder | None, results: Sequence[Tensor], saved: Sequence[Tensor | None]
    ) -> Trace | None:
        """The forward pass of a call has ended; what it leaves to `backward_ended`.

        Args:
            recorder: the one it ran in.
            saved: the tensors that backward will be given, before its own.
        """
        trace = None
        if recorder is not None:
            trace = Trace.of(recorder, results, saved)
            self._refuse(recorder, trace)
        if not self.with_grad:
            self._rounds += 1
            if trace is not None:
                self._forward = self._forward_of(trace, Room())
                self.is_ready = True
        return trace

    def backward_ended(
        self, forward: Trace | None, recorder: Recorder | None, results: Sequence[Tensor | None]
    ) -> None:
        """The backward pass of a call has ended.

        Args:
            forward: what `forward_ended` gave.
            recorder: the one it ran in, given the saved tensors and at last the gradient of o.
        """
        self._rounds += 1
        if forward is None or recorder is None or self.is_ready:
            return
        trace = Trace.of(recorder, [x for x in results if x is not None])
        self._refuse(recorder, trace)
        if trace is not None:
            kept = Room()
            self._backward = self._backward_of(trace, forward, kept)
            self._forward = self._forward_of(forward, kept)
            self._has_gradient = [x is not None for x in results]
            self.is_ready = True

    def _forward_of(self, trace: Trace, kept: Room) -> Recording:
        return Recording(Where(trace, self.num_inputs, lambda index: (index, 0), kept))

    def _backward_of(self, trace: Trace, forward: Trace, kept: Room) -> Recording:
        """It is handed the inputs, the kept room and the gradient of o."""
        count = self.num_inputs

        def given_at(index: int) -> tuple[int, int]:
            if index == len(forward.saved):
                return count + 1, 0
            place = forward.saved[index]
            assert place is not None
            if place.source == "given":
                return place.number, place.offset
            if place.source == "constant":
                return count + 2 + len(trace.results) + 2, forward.constants[
                    place.number
                ].data_ptr()
            size = forward.sizes[place.number]
            return count, kept.offset_of(place.number, size) + place.offset

        return Recording(Where(trace, count + 2, given_at))

    def _refuse(self, recorder: Recorder, trace: Trace | None) -> None:
        if trace is None:
            self._refused = True
            _log.debug("a call is not repeated from a recording: %s", recorder.problem)

    # -- repeating ------------------------------------------------------------------------------

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        """The result for these inputs."""
        if self.with_grad:
            return _Repeated.apply(self, *inputs)  # type: ignore[no-any-return, no-untyped-call]
        return self.run_forward(inputs)[0]

    def run_forward(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """The result, and the room that backward is to be given."""
        assert self._forward is not None
        given = [0 if x is None else x.data_ptr() for x in inputs]
        results, kept = self._forward.run(given, current_traffic())
        return results[0], kept

    def run_backward(
        self,
        inputs: Sequence[Tensor | None],
        kept: Tensor | None,
        grad: Tensor,
        traffic: Traffic | None,
    ) -> list[Tensor | None]:
        """Gradients, as the general path gave them."""
        assert self._backward is not None
        given = [0 if x is None else x.data_ptr() for x in (*inputs, kept, grad)]
        found = iter(self._backward.run(given, traffic)[0])
        return [next(found) if there else None for there in self._has_gradient]


class _Repeated(torch.autograd.Function):
    """
    |          | in                 | out         |
    | forward  | inputs of a call   | its result  |
    | backward | gradient of that   | dinputs     |

    Saves the inputs, and one piece of memory with what the recorded backward pass reads. What is
    communicated, and counted, is what the recorded call did.
    """

    @staticmethod
    def forward(ctx: Any, call: RecordedCall, *inputs: Tensor | None) -> Tensor:
        o, kept = call.run_forward(inputs)
        ctx.save_for_backward(*inputs, kept)
        ctx.call, ctx.traffic = call, current_traffic()
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        *inputs, kept = ctx.saved_tensors
        if not grad.is_contiguous() or grad.data_ptr() % 16:
            grad = grad.clone(memory_format=torch.contiguous_format)
        return None, *ctx.call.run_backward(inputs, kept, grad, ctx.traffic)
