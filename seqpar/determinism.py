"""Runs that repeat every bit on the same hardware, and a word by which two runs are compared."""

from __future__ import annotations

import hashlib
import os

import torch
from torch import nn

__all__ = ["use_deterministic_algorithms", "weights_digest"]

CUBLAS_WORKSPACE = ":4096:8"
"""Eight buffers of 4 MiB: one of the two settings under which cuBLAS repeats its sums' order."""


def use_deterministic_algorithms() -> None:
    """Make this process repeat every bit of a run that has the same plans, seeds and hardware.

    What is not repeatable on CUDA otherwise is the backward pass of attention (cuDNN's, and
    torch's memory-efficient one) and cuBLAS on several streams. Sums over ranks, states and the
    lightning kernels keep their order in any mode. On CPU nothing changes.

    Call it before the first CUDA computation of the process: cuBLAS reads its setting once, from
    `CUBLAS_WORKSPACE_CONFIG`, which is left as it is where it is set. torch raises RuntimeError at
    the first matrix product that came too early, and at any operation of the model that it knows
    no repeatable form of.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
    torch.use_deterministic_algorithms(True)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of every parameter's name, dtype, shape and bytes: equal for equal bits alone."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
