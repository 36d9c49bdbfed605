"""Decoding with states that are written seldom.

Legend: B batch, T tokens, H heads, K key dim, V value dim.

`lightning_step` reads a state and writes a new one with every token. A `DecodingState` keeps the
last tokens' keys and values beside the state and puts them into it together, so that most steps
only read it: little more than half of the memory traffic.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from seqpar.errors import KernelInputError
from seqpar.kernels.as_given import as_given
from seqpar.kernels.lightning import chunked
from seqpar.kernels.lightning.inputs import Spec, check_inputs, state_dtype
from seqpar.kernels.lightning.plan import Plan, Problem, plan_of
from seqpar.kernels.on_device import on_device
from seqpar.kernels.tensors import check_like, check_tensors

__all__ = ["DecodingState"]

_PENDING = (1, 2, 4, 8, 16)


class _Kept(Protocol):
    """What holds the states on one kind of device."""

    def step(
        self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
    ) -> Tensor: ...

    def current(self) -> Tensor: ...


class DecodingState:
    """The states of a layer that decodes, which `step` carries on in place. Not differentiable.

    On a CUDA device it holds a copy of the states, and keys and values of up to `pending` - 1
    tokens a state: 6 % more memory for bfloat16, K = V = 128 and 8 of them. Its steps belong to
    one stream at a time. On the CPU, and for float64, every step writes.

    CUDA graphs may capture `step` and `state` once each has been called with a decay of the same
    form and as many tokens; a replay carries the states on by what q, k, v and log_decay then
    hold, and must not outlive this object. Steps in graphs and others may be mixed.

    Args:
        state: [B, H, K, V] float32 (float64 for such inputs), the states before the first token,
            as `lightning_attention` returns them; kept as it is. K and V from 1 to 256.
        dtype: of the q, k and v to come.
        pending: 1, 2, 4, 8 or 16: one step in so many writes a state. None: 8, or 1 where there
            are so few states that nothing is gained.

    Raises:
        KernelInputError: what does not fit, its value, and what would.
    """

    def __init__(self, state: Tensor, *, dtype: torch.dtype, pending: int | None = None) -> None:
        self._problem = _problem(state, dtype)
        if pending is not None and not (isinstance(pending, int) and pending in _PENDING):
            raise KernelInputError(f"pending is {pending!r}; it must be None or one of {_PENDING}")
        with torch.no_grad(), on_device(self._problem.device):
            self._kept = _kept(state.detach(), Plan(self._problem), pending)

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None) -> Tensor:
        """Decode one token, or a few in order: S_t = exp(g_t) S_(t-1) + k_tᵀ v_t, o_t = q_t S_t.

        Args:
            q, k: [B, T, H, K] and v: [B, T, H, V] of the dtype that was named. T may be 0; over 1
                the states are written.
            log_decay: None, [H] or [B, T, H] float32, as for `lightning_attention`; steps may
                differ in it.

        Returns:
            o [B, T, H, V] in v's dtype.

        Raises:
            KernelInputError: shapes, dtypes or devices that do not fit, before any launch.
        """
        plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=None)
        found, made = plan.problem, self._problem
        if found[2:7] != made[2:7] or found.batch != made.batch:
            raise KernelInputError(_differs(found, made))
        if found.tokens == 0 or v.numel() == 0:
            return torch.empty_like(v)
        with torch.no_grad(), on_device(found.device):
            return self._kept.step(plan, q, k, v, log_decay)

    def state(self) -> Tensor:
        """The states with every token in them: [B, H, K, V] float32 (or float64), a copy."""
        with torch.no_grad(), on_device(self._problem.device):
            return self._kept.current()


def _problem(state: Tensor, dtype: torch.dtype) -> Problem:
    """The sizes of a step of one token, after refusing states that cannot be carried on."""
    check_tensors(state=state)
    if state.ndim != 4:
        raise KernelInputError(f"state has shape {tuple(state.shape)}; it must be [B, H, K, V]")
    if not isinstance(dtype, torch.dtype):
        raise KernelInputError(f"dtype is {dtype!r}; pass that of q, k and v, say torch.bfloat16")
    batch, heads, key_dim, value_dim = state.shape
    keys, values = (
        Spec(torch.Size((batch, 1, heads, dim)), dtype, state.device, torch.strided)
        for dim in (key_dim, value_dim)
    )
    check_inputs(keys, values, log_decay=None, bounds=None)
    check_like("state", state, tuple(state.shape), state_dtype(dtype), state.device)
    return Problem(batch, 1, heads, key_dim, value_dim, dtype, state.device, 0, None)


def _differs(found: Problem, made: Problem) -> str:
    """What of a step's inputs is not as its states are."""
    names = ("batch", "heads", "key_dim", "value_dim", "dtype", "device")
    name = next(n for n in names if getattr(found, n) != getattr(made, n))
    return (
        f"{name} of q, k and v is {getattr(found, name)}, but this state was made for "
        f"{getattr(made, name)}; pass the like, or make a DecodingState for these"
    )


def _kept(state: Tensor, plan: Plan, pending: int | None) -> _Kept:
    if not plan.on_triton:
        return _CurrentState(state)
    from seqpar.kernels.lightning.deferred_step import DeferredState

    return DeferredState(state, plan.problem.dtype, pending)


class _CurrentState:
    """The states with every token in them: without Triton nothing is gained by waiting."""

    def __init__(self, state: Tensor) -> None:
        self._state = state.clone(memory_format=torch.contiguous_format)

    def step(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        with as_given(q.device):
            o, self._state = chunked.step_recurrent(q, k, v, self._state, log_decay)
        return o

    def current(self) -> Tensor:
        return self._state.clone()
