"""Lightning attention as a mixer: the package's kernels behind the interface.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from seqpar.kernels import lightning
from seqpar.kernels.entry_product import add_entry_product, reached_tokens
from seqpar.ops.state_mixer import Inputs, Mixer, Summary

__all__ = ["LightningMixer", "fixed_on_host"]

_LATER_SHARE = 0.125
"""Adding later reads and writes the reached tokens once more: worth it while they are few."""

_HOST_COPIES: MutableMapping[Tensor, tuple[int, tuple[float, ...]]] = WeakIdKeyDictionary()


def fixed_on_host(log_decay: Tensor) -> tuple[float, ...] | None:
    """A fixed decay [H] as floats; None for decay per token.

    A copy from a CUDA device waits for the device, so it is made once for each tensor and version.
    """
    if log_decay.ndim != 1:
        return None
    if log_decay.is_inference():  # has no version to remember it by
        return tuple(log_decay.cpu().tolist())
    if log_decay in _HOST_COPIES:
        version, values = _HOST_COPIES[log_decay]
        if version == log_decay._version:
            return values
    values = tuple(log_decay.detach().cpu().tolist())
    _HOST_COPIES[log_decay] = (log_decay._version, values)
    return values


@lru_cache(maxsize=1024)
def _reaches_few(log_decay: tuple[float, ...], num_tokens: int) -> bool:
    """Whether a state reaches so few tokens, over all heads, that they can be added to later."""
    reached = sum(reached_tokens(g, num_tokens) for g in log_decay)
    return reached <= _LATER_SHARE * num_tokens * len(log_decay)


@dataclass(frozen=True)
class LightningMixer(Mixer):
    """Lightning attention by the package's kernels; inputs q, k, v and, if per token, log_decay."""

    log_decay: Tensor | None = None
    """Fixed decay [H], float32."""
    per_token: bool = False
    """A fourth input gives log decays [B, T, H]."""
    on_host: tuple[float, ...] | None = None
    """The fixed decay on the host: given, what has decayed under 2^-24 is left out."""

    def state_shape(self, inputs: Inputs) -> tuple[int, ...]:
        return (inputs[0].shape[2], inputs[0].shape[3], inputs[2].shape[3])

    def transition_dims(self) -> int | None:
        return None if self.log_decay is None and not self.per_token else 1

    @property
    def knows_transitions(self) -> bool:
        return self.log_decay is not None

    def known_log_transition(self, num_tokens: int) -> Tensor:
        assert self.log_decay is not None
        return self.log_decay.double() * num_tokens

    def of_heads(self, heads: slice) -> LightningMixer:
        return LightningMixer(
            log_decay=None if self.log_decay is None else self.log_decay[heads],
            per_token=self.per_token,
        )

    def host_log_decay(self) -> tuple[float, ...] | None:
        return self.on_host

    def can_add_later(self, num_tokens: int) -> bool:
        return self.on_host is not None and _reaches_few(self.on_host, num_tokens)

    def add_entry(self, o: Tensor, inputs: Inputs, entry: Tensor) -> None:
        self._add_product(o, inputs[0], entry, from_end=False)

    def add_exit_grad(
        self, grads: tuple[Tensor | None, ...], inputs: Inputs, exit_grad: Tensor
    ) -> None:
        _, dk, dv = grads
        assert dk is not None
        assert dv is not None
        _, k, v = inputs
        self._add_product(dk, v, exit_grad.mT, from_end=True)
        self._add_product(dv, k, exit_grad, from_end=True)

    def _add_product(self, out: Tensor, x: Tensor, matrix: Tensor, *, from_end: bool) -> None:
        assert self.log_decay is not None
        assert self.on_host is not None
        add_entry_product(
            out, x, matrix, log_decay=self.log_decay, on_host=self.on_host, from_end=from_end
        )

    def empty_output(self, inputs: Inputs) -> Tensor:
        return torch.empty_like(inputs[2])

    def summarize(self, inputs: Inputs, cu_seqlens: Tensor | None) -> Summary:
        kept = lightning.key_value_summary(
            inputs[1], inputs[2], log_decay=self._decay(inputs), cu_seqlens=cu_seqlens
        )
        return self._summary(kept)

    def output(
        self, inputs: Inputs, summary: Summary, entry: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        q, k, v = inputs[:3]
        return lightning.attend(
            q,
            k,
            v,
            summary.kept,
            log_decay=self._decay(inputs),
            cu_seqlens=cu_seqlens,
            entry_state=entry,
        )

    def summarize_grad(
        self,
        inputs: Inputs,
        do: Tensor,
        summary: Summary,
        entry: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Summary:
        kept = lightning.query_grad_summary(
            inputs[0], do, log_decay=self._decay(inputs), cu_seqlens=cu_seqlens
        )
        return self._summary(kept)

    def backward(
        self,
        inputs: Inputs,
        do: Tensor,
        summary: Summary,
        grad_summary: Summary,
        entry: Tensor | None,
        exit_grad: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        q, k, v = inputs[:3]
        dq, dk, dv, dlog_decay = lightning.attend_backward(
            q,
            k,
            v,
            do,
            summary.kept,
            grad_summary.kept,
            log_decay=self._decay(inputs),
            cu_seqlens=cu_seqlens,
            entry_state=entry,
            exit_state_grad=exit_grad,
        )
        return (dq, dk, dv, dlog_decay) if self.per_token else (dq, dk, dv)

    def _decay(self, inputs: Inputs) -> Tensor | None:
        return inputs[3] if self.per_token else self.log_decay

    def _summary(self, kept: lightning.Summary) -> Summary:
        identity = self.transition_dims() is None
        return Summary(kept.final_state, None if identity else lambda: kept.log_transition, kept)
