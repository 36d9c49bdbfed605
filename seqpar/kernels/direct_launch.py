"""A compiled Triton kernel, launched through the CUDA driver.

Parameters of a kernel that Triton has compiled, in order: a tensor's address (8 bytes); a
descriptor as its 128-byte tensor map, then its shape (4 bytes each) and strides (8 bytes each); an
integer (4 or 8 bytes); nothing for what was compiled in (constants, None, the integer 1); at last
the addresses of two scratch areas. What this file assumes is compared with the parameters that
the kernel's PTX declares, once for each compiled kernel.
"""

from __future__ import annotations

import ctypes
import re
import struct
import threading
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["DirectLaunch", "LaunchConfig", "TensorMaps", "UnknownLayoutError"]

_MAP_BYTES = 128
_ELEMENT_TYPES = {torch.float16: 6, torch.float32: 7, torch.bfloat16: 9}
"""CUtensorMapDataType."""
_PROMOTE_TO_128_BYTES = 2
"""CUtensorMapL2promotion."""
_MOST_MAPS = 1024


_PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""CUlaunchAttributeID of a launch that may start before the one before it has ended."""
_INVALID_CONTEXT = 201
"""CUDA_ERROR_INVALID_CONTEXT."""


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute, for an attribute whose value is one integer."""

    _fields_ = (
        ("id", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
        ("value", ctypes.c_int32),
        ("rest", ctypes.c_uint8 * 60),
    )

    def __init__(self, name: int, value: int) -> None:
        super().__init__(name, 0, value)


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared_bytes", ctypes.c_uint32),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("num_attributes", ctypes.c_uint32),
    )


class UnknownLayoutError(Exception):
    """A kernel whose parameters are not as this file expects them."""


class TensorMaps:
    """Tensor maps of tensors that differ in their address alone, kept by address.

    A map holds an address and a shape, no contents: it stays right when memory is given out anew.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        block: tuple[int, ...],
        swizzle: int,
    ) -> None:
        rank, size = len(shape), dtype.itemsize
        self._rank, self._type, self._swizzle = rank, _ELEMENT_TYPES[dtype], swizzle
        self._shape = (ctypes.c_uint64 * rank)(*reversed(shape))
        self._strides = (ctypes.c_uint64 * rank)(*(size * x for x in reversed(strides[:-1])))
        self._block = (ctypes.c_uint32 * rank)(*reversed(block))
        self._steps = (ctypes.c_uint32 * rank)(*([1] * rank))
        self._known: dict[int, bytes] = {}

    def at(self, address: int) -> bytes:
        """The map of the tensor that lies there."""
        return self._known.get(address) or self._encode(address)

    def _encode(self, address: int) -> bytes:
        room = ctypes.create_string_buffer(_MAP_BYTES + 64)
        start = -ctypes.addressof(room) % 64
        status = _in_context(
            _driver().cuTensorMapEncodeTiled,
            ctypes.addressof(room) + start, self._type, self._rank, address, self._shape,
            self._strides, self._block, self._steps, 0, self._swizzle, _PROMOTE_TO_128_BYTES, 0,
        )  # fmt: skip
        if status != 0:
            raise RuntimeError(f"cuTensorMapEncodeTiled failed with CUDA error {status}")
        if len(self._known) >= _MOST_MAPS:
            self._known.clear()
        self._known[address] = room.raw[start : start + _MAP_BYTES]
        return self._known[address]


tensor_maps = lru_cache(maxsize=1024)(TensorMaps)
"""`TensorMaps`, one for all kernels that see tensors of one form through the same window."""


class DirectLaunch:
    """One compiled kernel on one grid; a call gives its tensors in the kernel's order.

    Args:
        compiled: what `kernel[grid](...)` returned.
        grid: up to three dims.
        given: the tensors and descriptors of that first call, by parameter; later calls give
            tensors at other addresses.
        fixed: its other arguments.
    """

    def __init__(
        self, compiled: Any, grid: tuple[int, ...], *, given: dict[str, Any], fixed: dict[str, Any]
    ) -> None:
        self._compiled, self._fixed = compiled, fixed  # keeps the module and the tables alive
        sizes = _checked_sizes(compiled)
        maps = iter(getattr(compiled.metadata, "tensordesc_meta", None) or ())
        self.maps: list[tuple[int, TensorMaps]] = []
        self.addresses: list[int] = []
        slots: list[tuple[str, int]] = []
        constants: list[bytes] = []
        position = {name: index for index, name in enumerate(given)}
        for name, kind in compiled.src.signature.items():
            if kind == "constexpr":
                continue
            if kind.startswith("tensordesc"):
                maps_of = _maps_for(given[name], next(maps))
                slots.append(("map", len(self.maps)))
                self.maps.append((position[name], maps_of))
                for number in (*given[name].shape, *given[name].strides):
                    slots.append(("constant", len(constants)))
                    constants.append(struct.pack("<q", number))
            elif name in given:
                slots.append(("address", len(self.addresses)))
                self.addresses.append(position[name])
            else:
                value = fixed[name]
                number = value.data_ptr() if isinstance(value, Tensor) else int(value)
                slots.append(("constant", len(constants)))
                constants.append(struct.pack("<q", number))
        for _ in range(2):
            slots.append(("constant", len(constants)))
            constants.append(struct.pack("<q", 0))
        if len(slots) != len(sizes):
            raise UnknownLayoutError(f"{len(sizes)} parameters instead of {len(slots)}")
        self._slots, self._constants = slots, ctypes.create_string_buffer(b"".join(constants))
        self._format = struct.Struct(f"<{'128s' * len(self.maps)}{len(self.addresses)}Q")
        self._buffer = ctypes.create_string_buffer(self._format.size)
        base = ctypes.addressof(self._buffer)
        after = base + _MAP_BYTES * len(self.maps)
        self._parameters = self.parameters(
            [base + _MAP_BYTES * index for index in range(len(self.maps))],
            [after + 8 * index for index in range(len(self.addresses))],
        )
        self._lock = threading.Lock()
        self._bind_call(grid)

    def _bind_call(self, grid: tuple[int, ...]) -> None:
        from triton.runtime.driver import driver

        self._stream_of = driver.active.get_current_stream
        self._device = driver.active.get_current_device()
        self._grid = grid
        self._attribute = _LaunchAttribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 1)
        self._config = self.new_config()
        self._at_config = ctypes.addressof(self._config)
        self._launch, self.function = _driver().cuLaunchKernelEx, self._compiled.function

    def new_config(self) -> LaunchConfig:
        """On how many blocks it runs, and when it may start; the stream is the caller's to set."""
        metadata = self._compiled.metadata
        blocks, threads = (*self._grid, 1, 1)[:3], (32 * metadata.num_warps, 1, 1)
        config = LaunchConfig(blocks, threads, metadata.shared)
        if getattr(metadata, "launch_pdl", False):
            config.attributes = ctypes.addressof(self._attribute)
            config.num_attributes = 1
        return config

    def launch(self, config: int, function: int, parameters: Any, extra: None) -> int:
        """cuLaunchKernelEx, in a thread that need not have called CUDA before."""
        return _in_context(self._launch, config, function, parameters, extra)

    @property
    def stream(self) -> int:
        """The current stream."""
        return int(self._stream_of(self._device))

    def parameters(self, map_cells: list[int], address_cells: list[int]) -> Any:
        """What a launch reads its parameters from: a pointer to each of them.

        Maps and addresses are read from where the caller says, in the order of `maps` and
        `addresses`, at the moment of the launch.
        """
        first = ctypes.addressof(self._constants)
        cells = {"map": map_cells, "address": address_cells}
        pointers = [
            first + 8 * index if kind == "constant" else cells[kind][index]
            for kind, index in self._slots
        ]
        return (ctypes.c_void_p * len(pointers))(*pointers)

    def __call__(self, *tensors: Tensor) -> None:
        values: list[bytes | int] = [maps.at(tensors[i].data_ptr()) for i, maps in self.maps]
        values += [tensors[i].data_ptr() for i in self.addresses]
        with self._lock:  # the buffer is this object's, whichever thread calls
            self._format.pack_into(self._buffer, 0, *values)
            self._config.stream = self._stream_of(self._device)
            status = self.launch(self._at_config, self.function, self._parameters, None)
        if status != 0:
            raise RuntimeError(f"launching {self._compiled.name} failed with CUDA error {status}")


def _in_context(call: Any, *arguments: Any) -> int:
    """A driver call's status; binds the device's context to a thread that has none.

    Such is a thread of autograd that has called nothing of CUDA before.
    """
    status = call(*arguments)
    if status == _INVALID_CONTEXT:
        context = ctypes.c_void_p()
        _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), torch.cuda.current_device())
        _driver().cuCtxSetCurrent(context)
        status = call(*arguments)
    return int(status)


def _maps_for(descriptor: Any, meta: dict[str, Any]) -> TensorMaps:
    """The maps of tensors like a descriptor's."""
    if meta["fp4_padded"] or meta.get("is_im2col"):
        raise UnknownLayoutError("a descriptor of a kind that is not used here")
    return tensor_maps(
        descriptor.base.dtype,
        tuple(descriptor.shape),
        tuple(descriptor.strides),
        tuple(meta["block_size"]),
        meta["swizzle"],
    )


def _checked_sizes(compiled: Any) -> tuple[int, ...]:
    """Bytes of each parameter by the kernel's PTX, after comparing them with the signature's."""
    metadata = compiled.metadata
    unusual = ("num_ctas", "global_scratch_size", "profile_scratch_size")
    if [getattr(metadata, name, 0) for name in unusual] != [1, 0, 0] or getattr(
        metadata, "launch_cooperative_grid", False
    ):
        raise UnknownLayoutError("the kernel asks for clusters, scratch memory or a grid at once")
    declared = _declared_sizes(compiled.asm["ptx"])
    expected = _expected_sizes(tuple(compiled.src.signature.values()))
    if declared != expected:
        raise UnknownLayoutError(f"parameters of {declared} bytes instead of {expected}")
    return declared


@lru_cache(maxsize=256)
def _declared_sizes(ptx: str) -> tuple[int, ...]:
    entry = ptx[ptx.index(".entry") :]
    found = re.findall(r"\.param\s+(?:\.align \d+\s+)?\.([ub])(\d+)[^,)]*", entry.split("{")[0])
    arrays = iter(re.findall(r"\.b8 \w+\[(\d+)\]", entry.split("{")[0]))
    return tuple(
        int(next(arrays)) if (kind, bits) == ("b", "8") else int(bits) // 8 for kind, bits in found
    )


@lru_cache(maxsize=256)
def _expected_sizes(signature: tuple[str, ...]) -> tuple[int, ...]:
    sizes: list[int] = []
    for kind in signature:
        if kind.startswith("tensordesc"):
            rank = kind[kind.index("[") : kind.index("]")].count(",") + 1
            sizes += [_MAP_BYTES, *[4] * rank, *[8] * rank]
        elif kind.startswith("*"):
            sizes.append(8)
        elif kind in ("i32", "i64", "u32", "u64"):
            sizes.append(int(kind[1:]) // 8)
        elif kind != "constexpr":
            raise UnknownLayoutError(f"a parameter of type {kind}")
    return (*sizes, 8, 8)


@lru_cache(maxsize=1)
def _driver() -> Any:
    """The CUDA driver. Not PyDLL: a launch waits while the device's queue is full, and the threads
    that look for ranks which do not come must go on meanwhile.
    """
    driver = ctypes.CDLL("libcuda.so.1")
    number, pointer = ctypes.c_uint32, ctypes.c_void_p
    driver.cuLaunchKernelEx.argtypes = [pointer] * 4
    driver.cuDevicePrimaryCtxRetain.argtypes = [pointer, ctypes.c_int]
    driver.cuCtxSetCurrent.argtypes = [pointer]
    driver.cuTensorMapEncodeTiled.argtypes = [
        pointer, number, number, pointer, pointer, pointer, pointer, pointer,
        number, number, number, number,
    ]  # fmt: skip
    return driver
