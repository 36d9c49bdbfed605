"""Two float64 references that say what lightning attention is; tests check them on each other.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences (B, or packed documents).

    S_t = exp(g_t) S_(t-1) + k_tᵀ v_t,    o_t = q_t S_t        (Qin et al., arXiv 2405.17381)

Token t sees itself undecayed and token t-1 decayed once, by t's own g. Both are plain
differentiable torch, so autograd gives the reference gradients.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

__all__ = ["quadratic_attention", "recurrent_attention", "sequence_bounds"]


def recurrent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Token by token. Returns o [B, T, H, V] and the final states [S, H, K, V], both float64."""
    q, k, v = q.double(), k.double(), v.double()
    decay = torch.exp(_token_decay(q, log_decay))
    outs: list[Tensor] = []
    finals: list[Tensor] = []
    for index, (rows, start, stop) in enumerate(sequence_bounds(q, cu_seqlens)):
        state = _entry(q, v, initial_state, index)
        for t in range(start, stop):
            update = k[rows, t, :, :, None] * v[rows, t, :, None, :]
            state = decay[rows, t, :, None, None] * state + update
            outs.append(torch.einsum("bhk,bhkv->bhv", q[rows, t], state))
        finals.append(state)
    return _assemble(outs, q, v, cu_seqlens), _stack(finals, q, v)


def quadratic_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every pair of tokens at once. Returns the same two float64 tensors."""
    q, k, v = q.double(), k.double(), v.double()
    log_token = _token_decay(q, log_decay)
    outs: list[Tensor] = []
    finals: list[Tensor] = []
    for index, (rows, start, stop) in enumerate(sequence_bounds(q, cu_seqlens)):
        q_s, k_s, v_s = (x[rows, start:stop].transpose(1, 2) for x in (q, k, v))
        reach = log_token[rows, start:stop].transpose(1, 2).cumsum(-1)
        ones = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).tril()
        gap = torch.where(ones, reach[..., :, None] - reach[..., None, :], -torch.inf)
        state = _entry(q, v, initial_state, index)
        o = (q_s @ k_s.mT * gap.exp()) @ v_s + reach.exp()[..., None] * (q_s @ state)
        outs.extend(o.transpose(1, 2).unbind(1))
        weights = (reach[..., -1:] - reach).exp()[..., None]
        total = reach[..., -1:].exp()[..., None] if stop > start else 1.0
        finals.append(total * state + (k_s * weights).mT @ v_s if stop > start else state)
    return _assemble(outs, q, v, cu_seqlens), _stack(finals, q, v)


def sequence_bounds(q: Tensor, cu_seqlens: Tensor | None) -> list[tuple[slice, int, int]]:
    """(batch rows, start, stop) of what runs as one recurrence: all rows at once, or a document."""
    if cu_seqlens is None:
        return [(slice(0, q.shape[0]), 0, q.shape[1])]
    return [(slice(0, 1), start, stop) for start, stop in itertools.pairwise(cu_seqlens.tolist())]


def _token_decay(q: Tensor, log_decay: Tensor | None) -> Tensor:
    if log_decay is None:
        return q.new_zeros(q.shape[:3])
    return log_decay.double().clamp(min=-700.0).expand(q.shape[:3])


def _entry(q: Tensor, v: Tensor, initial_state: Tensor | None, index: int) -> Tensor:
    """Entry states of one item of `sequence_bounds`: [B, H, K, V], or [1, H, K, V] if packed."""
    batch, _, heads, key_dim = q.shape
    if initial_state is None:
        return q.new_zeros(batch, heads, key_dim, v.shape[-1])
    return initial_state.double()[index * batch : (index + 1) * batch]


def _assemble(outs: list[Tensor], q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return torch.stack(outs, dim=1) if outs else v.new_zeros(*q.shape[:3], v.shape[-1])


def _stack(finals: list[Tensor], q: Tensor, v: Tensor) -> Tensor:
    return torch.cat(finals) if finals else v.new_zeros(0, *q.shape[2:], v.shape[-1])
