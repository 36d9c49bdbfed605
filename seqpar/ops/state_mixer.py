"""What a recurrent layer with a fixed-size state must offer to be scattered over ranks.

Legend: B batch, T tokens, H heads, K key dim, V value dim, S sequences.

A mixer maps the tokens of a sequence and the state E that enters it to outputs o = f(inputs, E)
and to the state that leaves, X = S + exp(G) E. f and X are affine in E; S and G depend on the
tokens alone. G is absent (identity), one number a head (scalar) or one a key dim (vector).

Inputs are tensors [B, T, ...]. The sequences are the rows, S = B; or, with `cu_seqlens` (int32,
on the CPU, [S + 1]), B = 1 and the row is S sequences packed end to end, each of 1 token or more.
Autocast is off inside: cast the inputs first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.ops.state_chain import decayed

__all__ = ["AutogradMixer", "Inputs", "Mixer", "StateKind", "Summary"]

Inputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Summary:
    """What a rank's tokens do to states; read backward in time, to gradients of states."""

    state: Tensor
    """[S, *state_shape], float32: S, what leaves when nothing enters."""
    log_transition: Tensor | None
    """G: [S, *leading part of state_shape], float32, <= 0; None is the identity, or a G that
    follows from `Mixer.log_decay_per_token`."""
    kept: Any = None
    """Whatever the mixer wants back in the calls that follow."""


@dataclass(frozen=True)
class StateKind:
    """What a mixer's states are like, without any tensor: what plans are made from and kept by."""

    state_shape: tuple[int, ...]
    """The shape of one sequence's state, for example (H, K, V)."""
    output_shape: tuple[int, ...]
    """The shape of one token's output, for example (H, V); its dtype is the first input's."""
    transition_dims: int | None
    """How many leading dims of the state's shape G has: None identity, 1 scalar, 2 vector, and 3 of
    3 a number for each element."""
    knows_transitions: bool = False
    """G is `log_decay_per_token` times the number of tokens: then it need not be sent."""
    host_log_decay: tuple[float, ...] | None = None
    """Fixed log decay of each head (the state's first dim), if states that have decayed under
    2^-24 are to be left out; else None."""
    adds_later: bool = False
    """Has `add_entry` and `add_exit_grad`: a state may arrive after `output` and `backward`."""
    heads_apart: bool = False
    """Has `of_heads`."""


class Mixer(ABC):
    """The mathematics of one layer on one device. Frozen: it holds options, never results."""

    @abstractmethod
    def kind(self, inputs: Inputs) -> StateKind:
        """What the states of these inputs are like. Asked before the inputs are checked."""

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

    def refusal(self, inputs: Inputs) -> str | None:
        """What the functions of this class could not take of these inputs, in a sentence that says
        what to change. Asked ahead of them, on ranks without tokens too."""
        return None

    def summarize_within(self, inputs: Inputs) -> Summary:
        """`summarize` of whole rows where nobody asks for `state`, which may be anything."""
        return self.summarize(inputs, None)

    def summarize_grad_within(
        self, inputs: Inputs, do: Tensor, summary: Summary, entry: Tensor | None
    ) -> Summary:
        """`summarize_grad` of whole rows where nobody asks for `state`, which may be anything."""
        return self.summarize_grad(inputs, do, summary, entry, None)

    def begin_backward(
        self, inputs: Inputs, do: Tensor, summary: Summary, entry: Tensor | None
    ) -> Callable[[Summary, Tensor | None], tuple[Tensor | None, ...]]:
        """Queue what of `backward`, of whole rows, needs no gradients of states.

        Returns what does the rest, given them: `grad_summary` and `exit_grad`.
        """
        return lambda grad_summary, exit_grad: self.backward(
            inputs, do, summary, grad_summary, entry, exit_grad, None
        )

    def add_entry(self, o: Tensor, inputs: Inputs, entry: Tensor) -> None:
        """Add to o [B, n, ...], in place, what states entering before its first token give it."""
        raise NotImplementedError("a mixer that adds later says how")

    def add_exit_grad(
        self, grads: tuple[Tensor | None, ...], inputs: Inputs, exit_grad: Tensor
    ) -> None:
        """Add to the inputs' gradients [B, n, ...], in place, the part through the state that
        leaves after the last token."""
        raise NotImplementedError("a mixer that adds later says how")

    @property
    def log_decay_per_token(self) -> Tensor | None:
        """Fixed log decay of one token, [leading part of state_shape]; None unless known."""
        return None

    def of_heads(self, heads: slice) -> Mixer:
        """The same mixer for some heads alone: dim 2 of every input."""
        raise NotImplementedError("a mixer whose heads are apart says how")


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
