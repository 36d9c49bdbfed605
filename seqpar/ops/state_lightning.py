"""Lightning attention as a mixer: the package's kernels behind the interface.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from seqpar.errors import KernelInputError
from seqpar.kernels import lightning
from seqpar.kernels.entry_product import add_entry_product
from seqpar.kernels.lightning.inputs import LOWEST_LOG_DECAY
from seqpar.kernels.lightning.plan import plan_of
from seqpar.ops.state_mixer import Inputs, Mixer, StateKind, Summary

__all__ = ["LightningMixer", "fixed_on_host"]

_HOST_COPIES: MutableMapping[Tensor, tuple[int, tuple[float, ...]]] = WeakIdKeyDictionary()


def fixed_on_host(log_decay: Tensor) -> tuple[float, ...] | None:
    """A fixed decay [H] as floats, not under -100 as in the kernels; None for decay per token.

    A copy from a CUDA device waits for the device, so it is made once for each tensor and version.
    """
    if log_decay.ndim != 1:
        return None
    if log_decay.is_inference():  # has no version to remember it by
        return _floats(log_decay)
    found = _HOST_COPIES.get(log_decay)
    if found is not None and found[0] == log_decay._version:
        return found[1]
    values = _floats(log_decay.detach())
    _HOST_COPIES[log_decay] = (log_decay._version, values)
    return values


def _floats(log_decay: Tensor) -> tuple[float, ...]:
    return tuple(max(g, LOWEST_LOG_DECAY) for g in log_decay.cpu().tolist())


@lru_cache(maxsize=256)
def _kind(
    dims: tuple[int, ...], decays: bool, per_token: bool, on_host: tuple[float, ...] | None
) -> StateKind:
    """Made once for the layers of a model that are alike."""
    return StateKind(
        state_shape=dims,
        output_shape=(*dims[:1], *dims[2:]),
        transition_dims=1 if decays or per_token else None,
        knows_transitions=decays,
        host_log_decay=on_host,
        adds_later=on_host is not None,
        heads_apart=True,
    )


@dataclass(frozen=True)
class LightningMixer(Mixer):
    """Lightning attention by the package's kernels; inputs q, k, v and, if per token, log_decay."""

    log_decay: Tensor | None = None
    """Fixed decay [H], float32."""
    per_token: bool = False
    """A fourth input gives log decays [B, T, H]."""
    on_host: tuple[float, ...] | None = None
    """The fixed decay on the host: given, what has decayed under 2^-24 is left out."""

    def kind(self, inputs: Inputs) -> StateKind:
        dims = (*inputs[0].shape[2:4], *inputs[2].shape[3:])
        return _kind(dims, self.log_decay is not None, self.per_token, self.on_host)

    @property
    def log_decay_per_token(self) -> Tensor | None:
        return self.log_decay

    def of_heads(self, heads: slice) -> LightningMixer:
        return LightningMixer(
            log_decay=None if self.log_decay is None else self.log_decay[heads],
            per_token=self.per_token,
        )

    def refusal(self, inputs: Inputs) -> str | None:
        q, k, v = inputs[:3]
        try:
            plan_of(k, v, queries=q, log_decay=self._decay(inputs), cu_seqlens=None)
        except KernelInputError as error:
            return str(error)
        return None

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

    def summarize(self, inputs: Inputs, cu_seqlens: Tensor | None) -> Summary:
        kept = lightning.key_value_summary(
            inputs[1], inputs[2], log_decay=self._decay(inputs), cu_seqlens=cu_seqlens
        )
        return self._summary(kept)

    def summarize_within(self, inputs: Inputs) -> Summary:
        decay = self._decay(inputs)
        kept = lightning.key_value_summary(inputs[1], inputs[2], log_decay=decay, leaving=False)
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

    def summarize_grad_within(
        self, inputs: Inputs, do: Tensor, summary: Summary, entry: Tensor | None
    ) -> Summary:
        decay = self._decay(inputs)
        kept = lightning.query_grad_summary(inputs[0], do, log_decay=decay, leaving=False)
        return self._summary(kept)

    def begin_backward(
        self, inputs: Inputs, do: Tensor, summary: Summary, entry: Tensor | None
    ) -> Callable[[Summary, Tensor | None], tuple[Tensor | None, ...]]:
        q, k, v = inputs[:3]
        dq = None
        if not self.per_token:  # else it comes with the decays' gradient
            dq = lightning.query_grad(
                q, k, v, do, summary.kept, log_decay=self.log_decay, entry_state=entry
            )
        return lambda grad_summary, exit_grad: self.backward(
            inputs, do, summary, grad_summary, entry, exit_grad, None, dq
        )

    def backward(
        self,
        inputs: Inputs,
        do: Tensor,
        summary: Summary,
        grad_summary: Summary,
        entry: Tensor | None,
        exit_grad: Tensor | None,
        cu_seqlens: Tensor | None,
        dq: Tensor | None = None,
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
            query_grad=dq,
        )
        return (dq, dk, dv, dlog_decay) if self.per_token else (dq, dk, dv)

    def _decay(self, inputs: Inputs) -> Tensor | None:
        return inputs[3] if self.per_token else self.log_decay

    def _summary(self, kept: lightning.Summary) -> Summary:
        return Summary(kept.final_state, kept.log_transition if self.per_token else None, kept)
