"""Measures the memory that a micro-batch takes: by token, and whatever its tokens.

On CUDA it is the allocator's peak over forward and backward at two numbers of tokens: the line
through both, so that workspaces, logits and gradients count as they occur. The CPU's allocator
keeps no peak; there it is what autograd saves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar import comm
from seqpar.training import PlanExecutor

__all__ = ["MemoryUse", "memory_use", "saved_bytes_per_token"]

DOCUMENT_TOKENS = 512


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one device, beside what was allocated before the micro-batch began."""

    bytes_per_token: float
    fixed_bytes: float


def memory_use(executor: PlanExecutor, *, vocab_size: int, tokens: int) -> MemoryUse:
    """What documents of `tokens` tokens in all take on a device, by token, and gradients.

    Collective; gradients are left in place. The largest of all ranks, the same on every rank.
    """
    gradients = sum(p.numel() * p.element_size() for p in executor.model.parameters())
    if executor.device.type != "cuda":
        return MemoryUse(saved_bytes_per_token(executor, vocab_size=vocab_size), gradients)
    _peak_bytes(executor, vocab_size, DOCUMENT_TOKENS)  # makes gradients and workspaces
    low, high = (_peak_bytes(executor, vocab_size, n) for n in (tokens // 2, tokens))
    slope = (high - low) / (tokens - tokens // 2)
    mine = torch.tensor([slope, high - slope * tokens], dtype=torch.float64)
    per_token, rest = comm.all_gather(mine.to(executor.device), executor.world).amax(0).tolist()
    return MemoryUse(bytes_per_token=max(per_token, 1.0), fixed_bytes=gradients + max(rest, 0.0))


def saved_bytes_per_token(executor: PlanExecutor, *, vocab_size: int, tokens: int = 2048) -> float:
    """Bytes of activations that one token keeps for backward, parameters apart; on one device."""
    own = {p.untyped_storage().data_ptr() for p in executor.model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = executor.loss_alone([torch.arange(tokens) % vocab_size])
        held = sum(kept.values())
    del loss
    return held / tokens


def _peak_bytes(executor: PlanExecutor, vocab_size: int, tokens: int) -> int:
    """The allocator's peak over forward and backward on this device, beyond what it held before."""
    documents = [torch.arange(n) % vocab_size for n in _documents_of(tokens)]
    torch.cuda.synchronize(executor.device)
    before = torch.cuda.memory_allocated(executor.device)
    torch.cuda.reset_peak_memory_stats(executor.device)
    executor.loss_alone(documents).backward()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(executor.device)
    return torch.cuda.max_memory_allocated(executor.device) - before


def _documents_of(tokens: int) -> list[int]:
    whole, rest = divmod(tokens, DOCUMENT_TOKENS)
    return [DOCUMENT_TOKENS] * whole + ([rest] if rest else [])
