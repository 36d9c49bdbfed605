"""The states that enter links of a chain, from the gathered messages of the links before them.

Legend: B batch, L links, N elements of one state, P elements of one transition, E entering links.

    entry = S_f;  entry = S_l + exp(G_l) entry   for l = f + 1, ..., the link before

One launch for all entering links of a rank. A message is [N] elements of S, and [P] of G where G
travels. Each G belongs to N / P neighbouring elements of S.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqpar.kernels.launch import Launch

__all__ = ["ChainTable", "can_sum", "chain_sums"]

_BLOCK = 1024
_ALIGNMENT = 16


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
    launches: dict[tuple[object, ...], Launch] = field(default_factory=dict, compare=False)
    """By what they depend on."""

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
        entered, rows, counts = (x[: len(part)] for x, part in zip(rooms, parts, strict=True))
        return cls(len(bounds), entered, rows, counts)


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
    if log_decay is not None:
        log_decay = log_decay.float().contiguous()
        if log_decay.data_ptr() % _ALIGNMENT:
            log_decay = log_decay.clone()
    entries = messages.new_empty(table.num_entries, *state_shape)
    rates = None if log_decay is None else log_decay.numel()
    key = (state_shape, messages.shape[1], carries, rates)
    if key not in table.launches:
        table.launches[key] = _launch(table, *key)
    tensors = (messages, entries) if log_decay is None else (messages, log_decay, entries)
    table.launches[key](*tensors)
    return entries


def _launch(
    table: ChainTable, state_shape: tuple[int, ...], width: int, carries: bool, rates: int | None
) -> Launch:
    """The launch for messages of so many elements, and so many rates of a fixed decay."""
    from seqpar.kernels.chain_sum_kernel import chain_sum_kernel

    numel = math.prod(state_shape)
    row_numel = numel // state_shape[0]
    share = numel
    if carries:
        share = numel // (width - numel)
    elif rates is not None:
        share = row_numel // rates
    fixed: dict[str, Any] = {
        "p_bounds": table.bounds,
        "p_slots": table.slots,
        "p_tokens": table.tokens,
        "numel": numel,
        "width": width,
        "row_numel": row_numel,
        "share": share,
        "CARRIES": carries,
        "BLOCK": _BLOCK,
    }
    if rates is None:
        fixed["p_decay"] = None
    return Launch(chain_sum_kernel, (-(-numel // _BLOCK), table.num_entries), fixed=fixed)
