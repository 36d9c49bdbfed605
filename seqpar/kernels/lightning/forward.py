"""Forward on Triton: at most three launches, none of which leaves a tensor as long as the input.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences, M segments.

    1. segment_states   what each segment adds to a passing state        reads k, v (where needed)
    2. enter_segments   what enters each of many segments                [M, H, K, V]
    3. output_pass      the outputs                                      reads q, k, v, writes o

Up to 16 segments a sequence, the third sums what comes before; with as many sequences and heads
as multiprocessors nothing is cut and only the third remains.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from seqpar.kernels.lightning.decays import Decays, prepare_decays
from seqpar.kernels.lightning.launch_output import output_pass
from seqpar.kernels.lightning.segments import Segments, cut
from seqpar.kernels.lightning.state_pass import enter_segments, segment_states
from seqpar.kernels.lightning.tuning import Config, configuration

__all__ = ["Prepared", "SegmentStates", "attend_triton", "prepare", "summarize"]

_log = logging.getLogger(__name__)
_MOST_IN_LINE = 16
"""Segments of a sequence up to which each program sums what comes before its own."""
MAX_GRAD_SEGMENT_CHUNKS = 32
"""A decay's gradient sums rounding errors from a token to the end of its segment."""


@dataclass(frozen=True)
class SegmentStates:
    """What the segments of one call add to a passing state."""

    segments: Segments
    decays: Decays
    states: Tensor | None
    """[M, H, K, V] float32, or None if no sequence is cut."""

    def into(self, initial: Tensor | None, *, reverse: bool) -> tuple[Tensor | None, bool]:
        """`states` and `scanned` of an output pass, for `initial` into each sequence."""
        if self.states is None or self.segments.deepest <= _MOST_IN_LINE:
            return self.states, False
        entries, _ = enter_segments(
            self.states,
            self.decays,
            self.segments,
            initial=initial,
            reverse=reverse,
            return_final=False,
        )
        return entries, True


@dataclass(frozen=True)
class Prepared:
    """Inputs as the kernels take them: rows aligned for bulk copies, decays in float32."""

    tensors: tuple[Tensor, ...]
    log_decay: Tensor
    bounds: tuple[int, ...]


def prepare(*tensors: Tensor, log_decay: Tensor | None, cu_seqlens: Tensor | None) -> Prepared:
    """Align tensors [B, T, H, D] (copies only what is not) and read the sequences' bounds."""
    if log_decay is None:  # a decay of one: a variant of its own crashes ptxas 12.8
        log_decay = torch.zeros(tensors[0].shape[2], device=tensors[0].device)
    log_decay = log_decay.detach().float().contiguous()
    batch, tokens = tensors[0].shape[:2]
    if cu_seqlens is None:
        bounds = tuple(range(0, batch * tokens + 1, tokens))
    else:
        bounds = tuple(cu_seqlens.tolist())
    return Prepared(tuple(aligned(x.detach()) for x in tensors), log_decay, bounds)


def aligned(x: Tensor) -> Tensor:
    """x with the last dim contiguous and every row on a 16-byte boundary; pads odd head dims."""
    per_16_bytes = 16 // x.element_size()
    dim = x.shape[3]
    if dim % per_16_bytes:
        _warn_padded(dim, x.dtype)
        x = functional.pad(x, (0, -dim % per_16_bytes))
    batch, tokens, heads, _ = x.shape
    fits = (
        x.stride(3) == 1
        and (heads == 1 or x.stride(2) % per_16_bytes == 0)
        and x.stride(1) % per_16_bytes == 0
        and (batch == 1 or x.stride(0) == tokens * x.stride(1))
        and x.data_ptr() % 16 == 0
        and min(x.stride()) > 0
    )
    return x if fits else x.contiguous()


@lru_cache(maxsize=64)
def _warn_padded(dim: int, dtype: torch.dtype) -> None:
    _log.warning("head dim %d in %s is not a multiple of 16 bytes: tensors are copied", dim, dtype)


def segments_of(prepared: Prepared, config: Config, value_dim: int, *, fine: bool) -> Segments:
    """The cut of these inputs; `fine` bounds segments as the decays' gradient needs."""
    x = prepared.tensors[0]
    lanes = x.shape[2] * -(-value_dim // config.value_tile)
    longest = MAX_GRAD_SEGMENT_CHUNKS * config.chunk if fine else 0
    slots = num_sms(x) * config.programs_per_sm
    return cut(prepared.bounds, lanes, slots, config.chunk, str(x.device), longest)


def num_sms(x: Tensor) -> int:
    """Multiprocessors of the tensor's device; 4 where the interpreter stands in for one."""
    if not x.is_cuda:
        return 4
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def summarize(
    y: Tensor, z: Tensor, prepared: Prepared, *, reverse: bool, return_final: bool
) -> tuple[SegmentStates, Tensor | None]:
    """What the segments add, and what leaves the sequences for zero in."""
    config = configuration(y.shape[3], z.shape[3], y.dtype)
    segments = segments_of(prepared, config, z.shape[3], fine=False)
    decays = prepare_decays(prepared.log_decay, segments, config.chunk)
    if segments.num_cut == 0 and not return_final:
        return SegmentStates(segments, decays, None), None
    states = segment_states(y, z, decays, segments, config, reverse=reverse, every=return_final)
    if segments.num_cut == 0:
        return SegmentStates(segments, decays, None), states
    final = None
    if return_final:
        _, final = enter_segments(states, decays, segments, reverse=reverse, return_final=True)
    return SegmentStates(segments, decays, states), final


def attend_triton(
    prepared: Prepared,
    states: SegmentStates,
    *,
    entry_state: Tensor | None,
    return_final: bool,
) -> tuple[Tensor, Tensor | None]:
    """Outputs [B, T, H, V] and, if asked for, the exit states [S, H, K, V]."""
    q, k, v = prepared.tensors
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    final = None
    if return_final:
        shape = (len(prepared.bounds) - 1, q.shape[2], q.shape[3], v.shape[3])
        final = torch.empty(shape, dtype=torch.float32, device=q.device)
    local_states, scanned = states.into(entry_state, reverse=False)
    output_pass(
        (q, k, v),
        o,
        states.decays,
        states.segments,
        configuration(q.shape[3], v.shape[3], q.dtype),
        states=local_states,
        scanned=scanned,
        initial=None if scanned else entry_state,
        final=final,
        reverse=False,
        transposed=False,
    )
    return o, final
