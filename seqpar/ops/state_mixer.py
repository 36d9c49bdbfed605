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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.ops.state_chain import decayed

__all__ = ["AutogradMixer", "Inputs", "Mixer", "Summary"]

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Summary:
    """What a rank's tokens do to states; read backward in time, to gradients of states."""

    state: Tensor
    """[S, *state_shape], float32: S, what leaves when nothing enters."""
    transition: Tensor | Callable[[], Tensor] | None
    """G: [S, *leading part of state_shape], float32, <= 0, or what makes it when it is wanted;
    None is the identity."""
    kept: Any = None
    """Whatever the mixer wants back in the calls that follow."""

    @property
    def log_transition(self) -> Tensor | None:
        """G."""
        return self.transition() if callable(self.transition) else self.transition


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
        return Summary(grad, summary.transition, (leaves, o, leaving))

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
