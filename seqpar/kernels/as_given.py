"""Computing in the precision of what is given, autocast or not."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["as_given"]


def as_given(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside: it would multiply states in half precision, in forward but not backward.

    Kernels do not see it, so that where they run this changes nothing.
    """
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)
