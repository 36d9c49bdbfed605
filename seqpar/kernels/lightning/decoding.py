"""Decoding with a state that is written seldom.

Legend: B batch, H heads, K key dim, V value dim, T tokens of a step.

`lightning_step` reads a state and writes a new one with every token. A `DecodingState` keeps the
last tokens' keys and values beside the state instead and puts them into it together, so that most
steps only read it: half the memory traffic where the state is what a step moves.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from seqpar.errors import KernelInputError
from seqpar.kernels.as_given import as_given
from seqpar.kernels.lightning import chunked
from seqpar.kernels.lightning.inputs import state_dtype
from seqpar.kernels.lightning.plan import Plan, Problem, plan_of
from seqpar.kernels.on_device import on_device
from seqpar.kernels.tensors import check_like, check_tensors

__all__ = ["DecodingState"]

_PENDING = (1, 2, 4, 8, 16, 32)


class _Kept(Protocol):
    """What holds the state on one kind of device."""

    def step(
        self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None
    ) -> Tensor: ...

    def folded(self) -> Tensor: ...

    def reorder_(self, rows: Tensor) -> None: ...


class DecodingState:
    """The state of a decoding layer, which its steps carry on in place. Not differentiable."""

    def __init__(self, state: Tensor, *, dtype: torch.dtype, pending: int = 16) -> None:
        check_tensors(state=state)
        if state.ndim != 4:
            raise KernelInputError(f"state has shape {tuple(state.shape)}; it must be [B, H, K, V]")
        check_like("state", state, tuple(state.shape), state_dtype(dtype), state.device)
        if pending not in _PENDING:
            raise KernelInputError(f"pending is {pending}; it must be one of {_PENDING}")
        batch, heads, key_dim, value_dim = state.shape
        device = state.device
        problem = Problem(batch, 1, heads, key_dim, value_dim, dtype, device, 0, None)
        self._of = problem
        self._fitting: set[Plan] = set()
        if Plan(problem).on_triton:
            from seqpar.kernels.lightning.deferred_step import DeferredState

            self._kept: _Kept = DeferredState(state.detach(), dtype, pending)
        else:
            self._kept = _CurrentState(state.detach())

    def step(self, q: Tensor, k: Tensor, v: Tensor, *, log_decay: Tensor | None = None) -> Tensor:
        plan = plan_of(k, v, queries=q, log_decay=log_decay, cu_seqlens=None)
        if plan not in self._fitting:
            self._check(plan)
        if not plan.problem.tokens:
            return torch.empty_like(v)
        with torch.no_grad(), on_device(plan.problem.device):
            return self._kept.step(plan, q, k, v, log_decay)

    def state(self) -> Tensor:
        with torch.no_grad(), on_device(self._of.device):
            return self._kept.folded()

    def _check(self, plan: Plan) -> None:
        found, made = plan.problem, self._of
        self._fitting.add(plan)


class _CurrentState:
    """The state with every token in it: on the CPU nothing is gained by waiting."""

    def __init__(self, state: Tensor) -> None:
        self._state = state.clone(memory_format=torch.contiguous_format)

    def step(self, plan: Plan, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None) -> Tensor:
        with as_given(q.device):
            o, new = chunked.step_recurrent(q, k, v, self._state, log_decay)
        self._state.copy_(new)
        return o

    def folded(self) -> Tensor:
        return self._state.clone()

    def reorder_(self, rows: Tensor) -> None:
        self._state.copy_(self._state.index_select(0, rows))
