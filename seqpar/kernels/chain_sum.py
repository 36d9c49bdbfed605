"""The states that enter links of a chain, from the gathered messages of the links before them.

Legend: B batch, L links, N elements of one state, P elements of one transition, E entering links.

    entry = S_f;  entry = S_l + exp(G_l) entry   for l = f + 1, ..., the link before

One launch for all entering links of a rank. A message is [N] elements of S, and [P] of G where G
travels. Each G belongs to N / P neighbouring elements of S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels.recorder import not_recorded

__all__ = ["ChainTable", "can_sum", "chain_sums"]

_BLOCK = 1024


@dataclass(frozen=True)
class ChainTable:
    """Which messages make up what: int32 tables on the messages' device, made once a layout."""

    num_entries: int
    bounds: Tensor
    """[E, 2]: the first link that contributes, and the link that is entered."""
    slots: Tensor
    """[L]: the row of each link's message."""
    tokens: Tensor
    """[L]: tokens of each link."""

    @classmethod
    def of(
        cls,
        bounds: list[tuple[int, int]],
        slots: list[int],
        tokens: list[int],
        device: torch.device,
    ) -> ChainTable:
        """From lists of the same meaning."""
        parts = ([bound for pair in bounds for bound in pair], slots, tokens)
        # Each begins at a multiple of 16 bytes: others ask for kernels of their own.
        padded = [[*part, *[0] * (-len(part) % 4)] for part in parts]
        table = torch.tensor([x for part in padded for x in part], dtype=torch.int32).to(device)
        rooms = torch.split(table, [len(part) for part in padded])
        views = (room[: len(part)] for room, part in zip(rooms, parts, strict=True))
        return cls(len(bounds), *views)


def can_sum(messages: Tensor) -> bool:
    """Whether the kernel takes these messages."""
    return messages.is_cuda and messages.dtype == torch.float32


def chain_sums(
    messages: Tensor,
    table: ChainTable,
    state_shape: tuple[int, ...],
    *,
    carries: bool,
    log_decay: Tensor | None,
) -> Tensor:
    """[E, *state_shape]: what enters each link of the table.

    Args:
        messages: [rows, N] float32, or [rows, N + P] if they carry transitions.
        state_shape: [B, ...] with N elements.
        carries: whether transitions travel.
        log_decay: [...] (a leading part of state_shape without B) float32: fixed log decay of one
            token; None: none, or it travels.
    """
    import triton

    from seqpar.kernels.chain_sum_kernel import chain_sum_kernel

    not_recorded("chain_sums is launched through Triton")
    numel, batch = math.prod(state_shape), state_shape[0]
    width = messages.shape[1]
    entries = messages.new_empty(table.num_entries, *state_shape)
    share = numel
    if carries:
        share = numel // (width - numel)
    elif log_decay is not None:
        share = numel // batch // log_decay.numel()
    kernel: Any = chain_sum_kernel
    kernel[(triton.cdiv(numel, _BLOCK), table.num_entries)](
        messages,
        None if log_decay is None else log_decay.float().contiguous(),
        entries,
        table.bounds,
        table.slots,
        table.tokens,
        numel,
        width,
        numel // batch,
        share,
        CARRIES=carries,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return entries
