"""Words of memory that streams wait for and write: no kernel is launched, no multiprocessor taken.

The device's front end carries them out (cuStreamWaitValue32, cuStreamWriteValue32). A word may lie
on this device, on a peer whose memory is mapped here, or in pinned memory of the host.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import torch

__all__ = ["wait_for_word", "write_word"]

_GREATER_OR_EQUAL = 0


def wait_for_word(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """The stream waits until the word is `value` or has passed it, by their difference."""
    flag = ctypes.c_uint32(value)
    _check(_driver().cuStreamWaitValue32_v2(stream.cuda_stream, address, flag, _GREATER_OR_EQUAL))


def write_word(stream: torch.cuda.Stream, address: int, value: int) -> None:
    """The stream writes the word, after everything before it can be seen by all devices."""
    flag = ctypes.c_uint32(value)
    _check(_driver().cuStreamWriteValue32_v2(stream.cuda_stream, address, flag, 0))


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"the driver refused a word that streams wait for: CUresult {status}")


@lru_cache(maxsize=1)
def _driver() -> Any:
    # Not PyDLL: a call waits while the device's queue is full, and other threads must go on.
    driver = ctypes.CDLL("libcuda.so.1")
    for name in ("cuStreamWaitValue32_v2", "cuStreamWriteValue32_v2"):
        arguments = [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_uint32]
        getattr(driver, name).argtypes = arguments
    return driver
