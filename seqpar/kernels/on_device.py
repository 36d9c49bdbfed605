"""Launching on the device that holds the tensors, whichever is current."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["on_device"]


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """The device is the current one inside: Triton launches on that, not where tensors are.

    Nothing where it is current already, or has no kernels.
    """
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
