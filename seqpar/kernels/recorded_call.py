"""A call that is decided once and then repeated, forward and backward.

A call of a kind runs as it is until one backward pass has ended (without gradients: once); the next
one is recorded; from then on it `is_ready`, and is repeated instead. The general path stays the
truth: what is repeated are its launches, in its order, on the same bits. Both ways save the same
tensors for backward (`seqpar.kernels.kept`), so a checkpointed call may take one way forward and
the other when it is recomputed.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.kernels.kept import Fitting, KeptTensors
from seqpar.kernels.recorder import Recorder
from seqpar.kernels.recording import Recording, Room, Trace
from seqpar.traffic import Traffic, current_traffic

__all__ = ["RecordedCall"]

_log = logging.getLogger(__name__)


class RecordedCall:
    """Forward and backward of one kind of call, recorded once and then repeated.

    The tensors of a call of one kind have the same shapes, strides, dtypes and device, and are as
    the general path takes them without a copy: at addresses that are multiples of 16 bytes.

    Args:
        with_grad: there is a backward pass.
    """

    def __init__(self, *, with_grad: bool) -> None:
        self.with_grad = with_grad
        self.is_ready = False
        self._rounds = 0
        self._began_in, self._refused = 0, False
        self._forward: Recording | None = None
        self._kept: KeptTensors | None = None
        self._backward: Recording | None = None
        self._fitting: Fitting | None = None
        self._has_gradient: list[bool] = []

    # -- recording, by the general path ---------------------------------------------------------

    def recorder(self, inputs: Sequence[Tensor | None]) -> Recorder | None:
        """What to run this call's forward pass in; None: as it is.

        Args:
            inputs: what a repeated call will be handed; some may be None, always the same ones.
        """
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
            saved: all that autograd saves, which backward will be given.
        """
        trace = None
        if recorder is not None:
            trace = Trace.of(recorder, results, saved)
            self._refuse(recorder, trace)
        if not self.with_grad:
            self._rounds += 1
            if trace is not None:
                self._forward = Recording(trace, Room())
                self.is_ready = True
        return trace

    def backward_recorder(self, saved: Sequence[Tensor | None], grad: Tensor) -> Recorder | None:
        """What to run the backward pass of a recorded forward pass in; None: as it is.

        Args:
            saved: what was saved, or the like of it.
            grad: of the result; should it be one of those saved, other calls' may not be.
        """
        address = grad.data_ptr()
        if any(x is not None and x.data_ptr() == address for x in saved):
            return None
        return Recorder([*saved, grad])

    def backward_ended(
        self, forward: Trace | None, recorder: Recorder | None, results: Sequence[Tensor | None]
    ) -> None:
        """The backward pass of a call has ended.

        Args:
            forward: what `forward_ended` gave.
            recorder: the one it ran in.
            results: a gradient for each input.
        """
        self._rounds += 1
        if forward is None or recorder is None or self.is_ready:
            return
        trace = Trace.of(recorder, [x for x in results if x is not None])
        self._refuse(recorder, trace)
        if trace is not None:
            self._kept = KeptTensors(forward)
            self._forward = Recording(forward, self._kept.room)
            self._backward, self._fitting = Recording(trace, Room()), Fitting(trace.given)
            self._has_gradient = [x is not None for x in results]
            self.is_ready = True

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

    def run_forward(
        self, inputs: Sequence[Tensor | None]
    ) -> tuple[Tensor, Sequence[Tensor | None]]:
        """The result, and what is to be saved."""
        assert self._forward is not None
        given = [0 if x is None else x.data_ptr() for x in inputs]
        results, room = self._forward.run(inputs, given, current_traffic())
        return results[0], () if self._kept is None else self._kept(inputs, room)

    def run_backward(
        self, saved: Sequence[Tensor | None], grad: Tensor, traffic: Traffic | None
    ) -> list[Tensor | None]:
        """Gradients, as the general path gave them."""
        assert self._backward is not None
        assert self._fitting is not None
        addresses, tensors = self._fitting((*saved, grad))
        found = iter(self._backward.run(tensors, addresses, traffic)[0])
        return [next(found) if there else None for there in self._has_gradient]


class _Repeated(torch.autograd.Function):
    """
    |          | in                 | out         |
    | forward  | inputs of a call   | its result  |
    | backward | gradient of that   | dinputs     |

    Saves what the general path saves. What is communicated, and counted, is what the recorded call
    did.
    """

    @staticmethod
    def forward(ctx: Any, call: RecordedCall, *inputs: Tensor | None) -> Tensor:
        o, saved = call.run_forward(inputs)
        ctx.save_for_backward(*saved)
        ctx.call, ctx.traffic = call, current_traffic()
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return None, *ctx.call.run_backward(ctx.saved_tensors, grad, ctx.traffic)
