"""The PyTorch path: one loop over chunks, all rows and heads of a chunk in a few matrix products.

Legend: B batch, T tokens, H heads, K key dim, V value dim, C tokens of a chunk, S sequences.
With G the running sum of log decays within a chunk, A the state that enters it:

    o   = ((q kᵀ) ∘ M) v + (q ∘ exp G) A            M_ij = exp(G_i - G_j) for j <= i, else 0
    A'  = exp(G_C) A + (k ∘ exp(G_C - G))ᵀ v

and backward, with E the gradient of the state that leaves the chunk and P = (q kᵀ) ∘ M:

    dq  = ((do vᵀ) ∘ M) k + (do Aᵀ) ∘ exp G
    dk  = ((do vᵀ) ∘ M)ᵀ q + (v Eᵀ) ∘ exp(G_C - G),   dv = Pᵀ do + (k E) ∘ exp(G_C - G)
    E'  = exp(G_C) E + (q ∘ exp G)ᵀ do

Every exponent is <= 0, so decays that underflow give zeros, never inf or NaN. Products run in
float32 (float64 for float64 inputs); a chunk at a time, so that half-precision inputs are never
cast whole.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.kernels.lightning.inputs import LOWEST_LOG_DECAY, state_dtype

__all__ = [
    "attend_backward_chunked",
    "attend_chunked",
    "key_value_state_chunked",
    "query_grad_state_chunked",
    "step_recurrent",
]

CHUNK = 64
"""Tokens of a chunk: below K and V the work of a token hardly depends on it."""


@dataclass(frozen=True)
class _ChunkDecay:
    """Decays of one chunk, ready to multiply: each [B|1, H, C, 1], `within` [B|1, H, C, C]."""

    from_entry: Tensor | None
    to_exit: Tensor | None
    across: Tensor | None
    within: Tensor


class _Decays:
    """Makes the decays of any chunk from log_decay in one of its three forms."""

    def __init__(self, log_decay: Tensor | None, like: Tensor) -> None:
        dtype = state_dtype(like.dtype)
        self._causal = torch.ones(CHUNK, CHUNK, dtype=dtype, device=like.device).tril()
        self._token: Tensor | None = None
        self._full: _ChunkDecay | None = None
        self._head: Tensor | None = None
        if log_decay is None:
            return
        log_decay = log_decay.detach().to(dtype).clamp(min=LOWEST_LOG_DECAY)
        if log_decay.ndim == 1:
            steps = torch.arange(1, CHUNK + 1, dtype=dtype, device=like.device)
            self._head = log_decay[None, :, None]
            self._full = self._from_reach(self._head.double() * steps)
        else:
            self._token = log_decay.transpose(1, 2)

    def chunk(self, rows: slice, start: int, stop: int) -> _ChunkDecay:
        size = stop - start
        if self._token is not None:
            return self._from_reach(self._token[rows, :, start:stop].double().cumsum(-1))
        if self._full is None or self._head is None:
            return _ChunkDecay(None, None, None, self._causal[:size, :size])
        full = self._full
        if size == CHUNK:
            return full
        assert full.from_entry is not None
        assert full.to_exit is not None
        return _ChunkDecay(
            full.from_entry[:, :, :size],
            full.to_exit[:, :, CHUNK - size :],
            (self._head * size).exp()[..., None],
            full.within[..., :size, :size],
        )

    def _from_reach(self, reach: Tensor) -> _ChunkDecay:
        """Sums are float64: resets make them large, and what counts is their differences."""
        size, dtype = reach.shape[-1], self._causal.dtype
        last = reach[..., -1:]
        gap = (reach[..., :, None] - reach[..., None, :]).to(dtype).clamp_(max=0.0).exp_()
        return _ChunkDecay(
            reach.to(dtype).exp()[..., None],
            (last - reach).to(dtype).exp()[..., None],
            last.to(dtype).exp()[..., None],
            gap.mul_(self._causal[:size, :size]),
        )


@dataclass(frozen=True)
class _Sequences:
    """The recurrences of one call: all rows of the batch in step, or packed documents in turn."""

    rows: slice
    states: slice
    start: int
    stop: int

    def chunks(self) -> list[tuple[int, int]]:
        return [
            (start, min(start + CHUNK, self.stop)) for start in range(self.start, self.stop, CHUNK)
        ]


def _sequences(like: Tensor, cu_seqlens: Tensor | None) -> Iterator[_Sequences]:
    if cu_seqlens is None:
        yield _Sequences(slice(None), slice(None), 0, like.shape[1])
        return
    for index, (start, stop) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        yield _Sequences(slice(None), slice(index, index + 1), start, stop)


def key_value_state_chunked(
    k: Tensor, v: Tensor, *, log_decay: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Exit states [S, H, K, V] of every sequence when nothing enters it."""
    decays = _Decays(log_decay, k)
    states = _new_states(k, v, cu_seqlens)
    for sequence in _sequences(k, cu_seqlens):
        state = states[sequence.states]
        for start, stop in sequence.chunks():
            k_c, v_c = _heads_first(start, stop, k, v)
            decay = decays.chunk(sequence.rows, start, stop)
            state = _pass_on(state, k_c, v_c, decay)
        states[sequence.states] = state
    return states


def attend_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    entry_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, V] and exit states [S, H, K, V] from the given entry states."""
    decays = _Decays(log_decay, q)
    states = _new_states(k, v, cu_seqlens, entry_state)
    o = v.new_empty(v.shape)
    for sequence in _sequences(q, cu_seqlens):
        state = states[sequence.states]
        for start, stop in sequence.chunks():
            q_c, k_c, v_c = _heads_first(start, stop, q, k, v)
            decay = decays.chunk(sequence.rows, start, stop)
            scores = torch.matmul(q_c, k_c.mT).mul_(decay.within)
            o_c = torch.matmul(_times(q_c, decay.from_entry), state)
            o_c += torch.matmul(scores, v_c)
            o[:, start:stop].copy_(o_c.transpose(1, 2))
            state = _pass_on(state, k_c, v_c, decay)
        states[sequence.states] = state
    return o, states


def query_grad_state_chunked(
    q: Tensor, do: Tensor, *, log_decay: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Gradients [S, H, K, V] of the entry states that come from local outputs alone."""
    decays = _Decays(log_decay, q)
    grads = _new_states(q, do, cu_seqlens)
    for sequence in _sequences(q, cu_seqlens):
        grad = grads[sequence.states]
        for start, stop in reversed(sequence.chunks()):
            q_c, do_c = _heads_first(start, stop, q, do)
            decay = decays.chunk(sequence.rows, start, stop)
            grad = _pass_back(grad, q_c, do_c, decay)
        grads[sequence.states] = grad
    return grads


def attend_backward_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    *,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    entry_state: Tensor | None,
    exit_state_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """dq, dk, dv in the inputs' dtype; dlog_decay [B, T, H] float32 if the decay is per token.

    Last, the gradient of the entry states [S, H, K, V].
    """
    decays = _Decays(log_decay, q)
    entries = _new_states(k, v, cu_seqlens, entry_state)
    exit_grads = _new_states(k, v, cu_seqlens, exit_state_grad)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    per_token = log_decay is not None and log_decay.ndim == 3
    dlog = q.new_empty(q.shape[:3], dtype=entries.dtype) if per_token else None
    for sequence in _sequences(q, cu_seqlens):
        state, chunk_states = entries[sequence.states], []
        for start, stop in sequence.chunks():
            k_c, v_c = _heads_first(start, stop, k, v)
            chunk_states.append(state)
            state = _pass_on(state, k_c, v_c, decays.chunk(sequence.rows, start, stop))
        grad = exit_grads[sequence.states].clone()
        for (start, stop), entry in zip(
            reversed(sequence.chunks()), reversed(chunk_states), strict=True
        ):
            inputs = _heads_first(start, stop, q, k, v, do)
            decay = decays.chunk(sequence.rows, start, stop)
            dq_c, dk_c, dv_c, dreach_c = _chunk_gradients(inputs, decay, entry, grad, per_token)
            for whole, part in ((dq, dq_c), (dk, dk_c), (dv, dv_c)):
                whole[:, start:stop].copy_(part.transpose(1, 2))
            if dlog is not None and dreach_c is not None:
                # Summed within the chunk alone: what later chunks add would cancel but for errors.
                crossing = (state * grad).sum((-2, -1))
                tail = dreach_c.double().flip(-1).cumsum(-1).flip(-1) + crossing[..., None]
                dlog[:, start:stop] = tail.transpose(1, 2)
            state, grad = entry, _pass_back(grad, inputs[0], inputs[3], decay)
        exit_grads[sequence.states] = grad
    return dq, dk, dv, dlog, exit_grads


def step_recurrent(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Token by token from a state that is kept as it is: o [B, T, H, V], and the new state."""
    state = state.to(state_dtype(q.dtype))
    o = torch.empty_like(v)
    for t in range(q.shape[1]):
        update = k[:, t, :, :, None].to(state.dtype) * v[:, t, :, None, :].to(state.dtype)
        if log_decay is not None:
            decay = log_decay if log_decay.ndim == 1 else log_decay[:, t]
            state = state * decay.to(state.dtype).exp()[..., None, None]
        state = state + update
        o[:, t] = torch.matmul(q[:, t, :, None, :].to(state.dtype), state)[..., 0, :]
    return o, state if q.shape[1] else state.clone()


def _chunk_gradients(
    inputs: tuple[Tensor, ...],
    decay: _ChunkDecay,
    entry: Tensor,
    exit_grad: Tensor,
    per_token: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """dq, dk, dv of one chunk, and the gradient of its running log decay G.

    The part of G's gradient that comes from pairs within the chunk is a row sum minus a column
    sum of the same numbers, so pairs that do not cross a token cancel exactly.
    """
    q, k, v, do = inputs
    scores = torch.matmul(q, k.mT).mul_(decay.within)
    dscores = torch.matmul(do, v.mT)
    pairs = (scores * dscores) if per_token else None
    dscores.mul_(decay.within)
    dq_entry = _times(torch.matmul(do, entry.mT), decay.from_entry)
    dk_exit = _times(torch.matmul(v, exit_grad.mT), decay.to_exit)
    dreach = None
    if pairs is not None:
        dreach = pairs.sum(-1) - pairs.sum(-2) + (q * dq_entry).sum(-1) - (k * dk_exit).sum(-1)
    dq = dq_entry.add_(torch.matmul(dscores, k))
    dk = dk_exit.add_(torch.matmul(dscores.mT, q))
    dv = _times(torch.matmul(k, exit_grad), decay.to_exit).add_(torch.matmul(scores.mT, do))
    return dq, dk, dv, dreach


def _new_states(
    k: Tensor, v: Tensor, cu_seqlens: Tensor | None, value: Tensor | None = None
) -> Tensor:
    """A fresh [S, H, K, V] in the state dtype, zero or a copy of `value`."""
    sequences = k.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    shape = (sequences, k.shape[2], k.shape[3], v.shape[3])
    states = k.new_zeros(shape, dtype=state_dtype(k.dtype))
    return states if value is None else states.copy_(value)


def _heads_first(start: int, stop: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, T, H, D] to the chunk's [B, H, C, D] in the state dtype."""
    dtype = state_dtype(tensors[0].dtype)
    return tuple(x[:, start:stop].transpose(1, 2).to(dtype) for x in tensors)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _pass_on(state: Tensor, k: Tensor, v: Tensor, decay: _ChunkDecay) -> Tensor:
    return torch.matmul(_times(k, decay.to_exit).mT, v).add_(_times(state, decay.across))


def _pass_back(grad: Tensor, q: Tensor, do: Tensor, decay: _ChunkDecay) -> Tensor:
    return torch.matmul(_times(q, decay.from_entry).mT, do).add_(_times(grad, decay.across))
