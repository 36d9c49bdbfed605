"""Launching a Triton kernel with few host instructions.

`kernel[grid](...)` looks at every argument of every call again: types, alignment, which compiled
variant they need, and a bulk-copy descriptor for each tensor that is read through one. On a host
that takes 60 us a launch this outlasts the kernels of a short sequence. A `Launch` is a kernel
with everything bound but the addresses of its tensors. The first call goes through Triton, which
compiles; the following ones hand the same compiled function its parameters through the driver's
own `cuLaunchKernelEx`: a few addresses packed into a buffer, descriptors looked up by address.
A `Recorder` is told of every launch while it is in force.

Where the compiled kernel's parameters are not laid out as expected (another version of Triton),
and under the interpreter, every call goes through Triton. Triton is imported by the first launch:
recordings name `Launch` where no GPU and no Triton is.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

from torch import Tensor

from seqpar.kernels.direct_launch import DirectLaunch, UnknownLayoutError
from seqpar.kernels.recorder import current_recorder

__all__ = ["Launch", "Window"]

_log = logging.getLogger(__name__)

_MOST_PROGRAMS = 65535
"""Along the second and third dim of a grid; the first may have 2^31 - 1."""


class Window:
    """How a kernel sees a tensor [B, T, H, D] through a descriptor: blocks of rows of one head.

    `flat`: as [B * T, H * D], heads side by side; otherwise as [B * T, H, D]. Rows must lie evenly
    apart across the batch. What is outside reads as zero. `for_gluon`: for a kernel in Gluon,
    blocks in shared memory swizzled over 128 bytes.
    """

    def __init__(self, rows: int, columns: int, *, flat: bool, for_gluon: bool = False) -> None:
        self.block = [rows, columns] if flat else [rows, 1, columns]
        self.flat, self.for_gluon = flat, for_gluon

    def of(self, x: Tensor) -> Any:
        """The descriptor of a tensor."""
        if x.ndim == 2:
            return _descriptor(x, list(x.shape), list(x.stride()), self.block)
        batch, tokens, heads, dim = x.shape
        if self.flat:
            shape, strides = [batch * tokens, heads * dim], [x.stride(1), 1]
        else:
            shape, strides = [batch * tokens, heads, dim], [x.stride(1), x.stride(2), 1]
        if self.for_gluon:
            return _gluon_descriptor(x, shape, strides, self.block)
        return _descriptor(x, shape, strides, self.block)


def _descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, shape, strides, block)


def _gluon_descriptor(x: Tensor, shape: list[int], strides: list[int], block: list[int]) -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

    layout = NVMMASharedLayout(128, 8 * x.element_size(), len(block))
    return GluonDescriptor(x, shape, strides, block, layout)


class Launch:
    """A kernel and all its arguments but some tensors, which a call gives in the kernel's order.

    All calls must give tensors of the same shapes, strides, dtypes and device, at addresses that
    are multiples of 16 bytes.

    `overlap`: what the kernel's OVERLAP is to be; if true, its programs may start while the launch
    before it in the stream still runs (seqpar/kernels/overlap.py).
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *,
        fixed: dict[str, Any],
        windows: dict[str, Window] | None = None,
        num_warps: int = 4,
        overlap: bool | None = None,
    ) -> None:
        assert max(grid[1:], default=1) <= _MOST_PROGRAMS, f"{grid}: put what grows first"
        self._kernel, self._grid = kernel, grid
        self._fixed, self._windows = fixed, windows or {}
        self._options: dict[str, Any] = {"num_warps": num_warps}
        if overlap is not None:
            self._fixed = {**fixed, "OVERLAP": overlap}
        if overlap:
            self._options["launch_pdl"] = True
        parameters = inspect.signature(kernel.fn).parameters
        self.names = [name for name in parameters if name not in self._fixed]
        """The kernel's parameters that a call gives, in order."""
        self._direct: DirectLaunch | None = None
        self._can_bind = True

    @property
    def direct(self) -> DirectLaunch | None:
        """How calls go past Triton: from the second on, on a GPU."""
        return self._direct

    def __call__(self, *tensors: Tensor) -> None:
        recorder = current_recorder()
        if recorder is None:
            self._run(*tensors)
        else:
            recorder.do(self._run, *tensors, step=self)

    def _run(self, *tensors: Tensor) -> None:
        if self._direct is not None:
            self._direct(*tensors)
        else:
            self.through_triton(*tensors)

    def through_triton(self, *tensors: Tensor) -> None:
        """The launch as Triton does it, which compiles the kernel if need be."""
        given = dict(zip(self.names, tensors, strict=True))
        for name, window in self._windows.items():
            given[name] = window.of(given[name])
        compiled = self._kernel[self._grid](**given, **self._fixed, **self._options)
        if compiled is not None and self._can_bind:
            self._bind(compiled, given)

    def _bind(self, compiled: Any, given: dict[str, Any]) -> None:
        try:
            self._direct = DirectLaunch(compiled, self._grid, given=given, fixed=self._fixed)
        except UnknownLayoutError as reason:
            self._can_bind = False
            _log.warning("kernels are launched through Triton, which is slower: %s", reason)
