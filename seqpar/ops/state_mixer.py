"""What a recurrent layer with a fixed-size state must offer to be scattered over ranks.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences.

A mixer maps the tokens of a sequence and the state E that enters it to outputs o = f(inputs, E)
and to the state that leaves, X = S + exp(G) E. f and X are affine in E; S and G depend on the
tokens alone. G is absent (identity), one number a head (scalar) or one a key dim (vector).

Inputs are tensors [B, T, ...]. The sequences are the rows, S = B; or, with `cu_seqlens` (int32,
on the CPU, [S + 1]), B = 1 and the row is S sequences packed end to end, each of 1 token or more.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import MutableMapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from seqpar.kernels import lightning
from seqpar.kernels.entry_product import add_entry_product, reached_tokens
from seqpar.ops.state_chain import decayed

__all__ = ["AutogradMixer", "LightningMixer", "Mixer", "Summary", "fixed_on_host"]

Inputs = tuple[Tensor, ...]

_LATER_SHARE = 0.125
"""Adding later reads and writes the reached tokens once more: worth it while they are few."""


@dataclass(frozen=True)
class Summary:
    """What a rank's tokens do to states; read backward in time, to gradients of states."""

    state: Tensor
    """[S, *state_shape], float32: S, what leaves when nothing enters."""
    log_transition: Tensor | None
    """[S, *leading part of state_shape], float32, <= 0; None is the identity."""
    kept: Any = None
    """Whatever the mixer wants back in the calls that follow."""


class Mixer(ABC):
    """The mathematics of one layer on one device. Frozen: it holds options, never results."""

    @abstractmethod
    def state_shape(self, inputs: Inputs) -> tuple[int, ...]:
        """The shape of one sequence's state, for example (H, K, V)."""

    @abstractmethod
    def transition_dims(self) -> int | None:
        """How many leading dims of the state's shape G has: 1 scalar, 2 vector, None identity."""

    @abstractmethod
    def empty_output(self, inputs: Inputs) -> Tensor:
        """Uninitialised memory of the output's shape and dtype."""

    @abstractmethod
    def summarize(self, inputs: Inputs, cu_seqlens: Tensor | None) -> Summary:
        """S and G of every sequence."""

    @abstractmethod
    def output(
        self, inputs: Inputs, summary: Summary, entry: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """o from the states [S, *state_shape] that enter; None: nothing enters anywhere."""

    @abstractmethod
    def summarize_grad(
        self,
        inputs: Inputs,
        do: Tensor,
        summary: Summary,
        entry: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Summary:
        """The gradient of the entering states that comes from o alone (`state`), before any
        gradient of leaving states is known; `log_transition` as in `summarize`."""

    @abstractmethod
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
        """Gradients of the inputs through o and through the states X that leave."""

    def can_add_later(self, num_tokens: int) -> bool:
        """Whether to add a state's part to tokens afterwards (`add_entry`, `add_exit_grad`), so
        that it may arrive late, instead of waiting for it before `output` and `backward`."""
        del num_tokens
        return False

    def add_entry(self, o: Tensor, inputs: Inputs, entry: Tensor) -> None:
        """Add to o [B, n, ...], in place, what states entering before its first token give it."""
        raise NotImplementedError("a mixer that can add later says how")

    def add_exit_grad(
        self, grads: tuple[Tensor | None, ...], inputs: Inputs, exit_grad: Tensor
    ) -> None:
        """Add to the inputs' gradients [B, n, ...], in place, the part through the state that
        leaves after the last token."""
        raise NotImplementedError("a mixer that can add later says how")

    def host_log_decay(self) -> tuple[float, ...] | None:
        """Fixed log decay of each head (the state's first dim) on the host, if states that have
        decayed under 2^-24 are to be left out; else None."""
        return None

    @property
    def knows_transitions(self) -> bool:
        """Whether G depends on the number of tokens alone: then it need not be sent."""
        return False

    def known_log_transition(self, num_tokens: int) -> Tensor:
        """G of a sequence of so many tokens, [leading part of state_shape], where it is known."""
        raise NotImplementedError("a mixer that knows its transitions says them")

    def of_heads(self, heads: slice) -> Mixer | None:
        """The same mixer for some heads, dim 2 of every input, alone; None: heads are not apart."""
        del heads
        return None


_HOST_COPIES: MutableMapping[Tensor, tuple[int, tuple[float, ...]]] = WeakIdKeyDictionary()


def fixed_on_host(log_decay: Tensor) -> tuple[float, ...] | None:
    """A fixed decay [H] as floats; None for decay per token.

    A copy from a CUDA device waits for the device, so it is made once for each tensor and version.
    """
    if log_decay.ndim != 1:
        return None
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
        assert self.on_host is not None
        add_entry_product(o, inputs[0], entry, log_decay=self.on_host, from_end=False)

    def add_exit_grad(
        self, grads: tuple[Tensor | None, ...], inputs: Inputs, exit_grad: Tensor
    ) -> None:
        assert self.on_host is not None
        _, dk, dv = grads
        assert dk is not None
        assert dv is not None
        _, k, v = inputs
        add_entry_product(dk, v, exit_grad.mT, log_decay=self.on_host, from_end=True)
        add_entry_product(dv, k, exit_grad, log_decay=self.on_host, from_end=True)

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
        return Summary(kept.final_state, None if identity else kept.log_transition, kept)


class AutogradMixer(Mixer):
    """A mixer that gives `summarize` and `output` in differentiable torch; autograd does the rest.

    Both are run again in backward, so nothing of the forward pass is kept but its inputs.
    """

    def summarize_grad(
        self,
        inputs: Inputs,
        do: Tensor,
        summary: Summary,
        entry: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Summary:
        with torch.enable_grad():
            leaves = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
            again = self.summarize(leaves, cu_seqlens)
            start = torch.zeros_like(summary.state) if entry is None else entry.detach()
            start.requires_grad_()
            o = self.output(leaves, again, start, cu_seqlens)
            leaving = again.state + decayed(start, again.log_transition)
        (grad,) = torch.autograd.grad(o, start, do, retain_graph=True)
        return Summary(grad, summary.log_transition, (leaves, o, leaving))

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
        leaves, o, leaving = grad_summary.kept
        wanted = [x for x in leaves if x.requires_grad]
        outputs, grads = ([o], [do]) if exit_grad is None else ([o, leaving], [do, exit_grad])
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return tuple(next(found) if x.requires_grad else None for x in leaves)
