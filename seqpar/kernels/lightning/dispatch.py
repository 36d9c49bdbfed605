"""Which path runs: Triton on CUDA devices, the PyTorch loop on CPU and for float64.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from seqpar.kernels.lightning import chunked

if TYPE_CHECKING:
    from seqpar.kernels.lightning.forward import SegmentStates

    LocalStates: TypeAlias = SegmentStates
else:
    LocalStates = object

__all__ = ["LocalStates", "Needs", "attend", "backward", "forward", "step", "summary"]


@dataclass(frozen=True)
class Needs:
    """Which gradients beside dq, dk and dv are wanted."""

    decay_grad: bool
    entry_grad: bool


def on_triton(x: Tensor) -> bool:
    """Whether the Triton kernels take this tensor; they are imported only then."""
    return x.is_cuda and x.dtype != torch.float64 and x.numel() > 0


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    return_final: bool,
) -> tuple[Tensor, Tensor | None, LocalStates | None]:
    """o, the final state if asked for, and what backward can use again."""
    if not on_triton(q):
        o, final = chunked.attend_chunked(
            q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens, entry_state=initial_state
        )
        return o, final if return_final else None, None
    return triton_forward(q, k, v, log_decay, cu_seqlens, initial_state, return_final)


def triton_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    return_final: bool,
) -> tuple[Tensor, Tensor | None, LocalStates | None]:
    """`forward` on the Triton kernels, whatever the device."""
    from seqpar.kernels.lightning.forward import attend_triton, prepare, summarize

    prepared = prepare(q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens)
    _, keys, values = prepared.tensors
    states, _ = summarize(keys, values, prepared, reverse=False, return_final=False)
    initial_state = _state_for(initial_state, keys, values)
    o, final = attend_triton(prepared, states, entry_state=initial_state, return_final=return_final)
    if final is not None:
        final = _trimmed(final, k.shape[3], v.shape[3])
    return _trimmed(o, v.shape[3]), final, states


def summary(
    y: Tensor,
    z: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, LocalStates | None]:
    """What leaves each sequence for zero in: [S, H, K, V], of (k, v), or of (q, do) reversed."""
    if on_triton(y):
        return triton_summary(y, z, log_decay, cu_seqlens, reverse=reverse)
    options = {"log_decay": log_decay, "cu_seqlens": cu_seqlens}
    if reverse:
        return chunked.query_grad_state_chunked(y, z, **options), None
    return chunked.key_value_state_chunked(y, z, **options), None


def triton_summary(
    y: Tensor,
    z: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    reverse: bool,
) -> tuple[Tensor, LocalStates | None]:
    """`summary` on the Triton kernels, whatever the device."""
    from seqpar.kernels.lightning.forward import prepare, summarize

    prepared = prepare(y, z, log_decay=log_decay, cu_seqlens=cu_seqlens)
    first, second = prepared.tensors
    states, final = summarize(first, second, prepared, reverse=reverse, return_final=True)
    assert final is not None
    return _trimmed(final, y.shape[3], z.shape[3]), states


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    entry_state: Tensor | None,
    states: LocalStates | None,
) -> Tensor:
    """Outputs from entry states, with the segments' states of `summary` if it ran on Triton."""
    if states is None:
        return chunked.attend_chunked(
            q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens, entry_state=entry_state
        )[0]
    from seqpar.kernels.lightning.forward import attend_triton, prepare

    prepared = prepare(q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens)
    entry_state = _state_for(entry_state, *prepared.tensors[1:])
    o, _ = attend_triton(prepared, states, entry_state=entry_state, return_final=False)
    return _trimmed(o, v.shape[3])


def backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    entry_state: Tensor | None,
    exit_state_grad: Tensor | None,
    *,
    states: LocalStates | None,
    grad_states: LocalStates | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """dq, dk, dv, dlog_decay [B, T, H] (per-token decay only), dentry [S, H, K, V].

    `inputs` are q, k, v, do.
    """
    if states is not None:
        return triton_backward(
            inputs,
            log_decay,
            cu_seqlens,
            entry_state,
            exit_state_grad,
            states=states,
            grad_states=grad_states,
            needs=needs,
        )
    return chunked.attend_backward_chunked(
        *inputs,
        log_decay=log_decay,
        cu_seqlens=cu_seqlens,
        entry_state=entry_state,
        exit_state_grad=exit_state_grad,
    )


def triton_backward(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    log_decay: Tensor | None,
    cu_seqlens: Tensor | None,
    entry_state: Tensor | None,
    exit_state_grad: Tensor | None,
    *,
    states: LocalStates,
    grad_states: LocalStates | None,
    needs: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """`backward` on the Triton kernels, whatever the device."""
    from seqpar.kernels.lightning.backward import backward_triton
    from seqpar.kernels.lightning.decay_gradient import backward_with_decay
    from seqpar.kernels.lightning.forward import prepare, summarize

    prepared = prepare(*inputs, log_decay=log_decay, cu_seqlens=cu_seqlens)
    q, k, v, do = prepared.tensors
    key_dim, value_dim = inputs[1].shape[3], inputs[2].shape[3]
    entry_state, exit_state_grad = (_state_for(x, k, v) for x in (entry_state, exit_state_grad))
    dlog_decay: Tensor | None = None
    dentry: Tensor | None
    if needs.decay_grad and log_decay is not None and log_decay.ndim == 3:
        dq, dk, dv, dlog_decay, dentry = backward_with_decay(prepared, entry_state, exit_state_grad)
    else:
        if grad_states is None:
            grad_states, _ = summarize(q, do, prepared, reverse=True, return_final=False)
        dq, dk, dv, dentry = backward_triton(
            prepared,
            states,
            grad_states,
            entry_state=entry_state,
            exit_state_grad=exit_state_grad,
            return_entry_grad=needs.entry_grad,
        )
    if dentry is not None:
        dentry = _trimmed(dentry, key_dim, value_dim)
    trimmed = (_trimmed(dq, key_dim), _trimmed(dk, key_dim), _trimmed(dv, value_dim))
    return *trimmed, dlog_decay, dentry


def step(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, log_decay: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A few recurrent steps from a state that is kept as it is."""
    if on_triton(q):
        from seqpar.kernels.lightning.step import step_triton

        return step_triton(q, k, v, state, log_decay)
    return chunked.step_recurrent(q, k, v, state, log_decay)


def _state_for(state: Tensor | None, keys: Tensor, values: Tensor) -> Tensor | None:
    """A state as the kernels take it: float32, contiguous, padded like the inputs."""
    if state is None:
        return None
    pad = (0, values.shape[3] - state.shape[3], 0, keys.shape[3] - state.shape[2])
    state = state.detach().float()
    return (functional.pad(state, pad) if any(pad) else state).contiguous()


def _trimmed(x: Tensor, *dims: int) -> Tensor:
    """x without the padding of its last dims."""
    for offset, dim in enumerate(dims):
        x = x.narrow(x.ndim - len(dims) + offset, 0, dim)
    return x.contiguous()
