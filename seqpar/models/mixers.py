"""The two token mixers, each one sequence-parallel operator between projections.

Shape letters: B batch, T tokens on this rank, C channels, H query heads, G key/value heads, K head
dim. Both take the rank's tokens, their positions within documents, the layout of the packed
stream, the group that holds it, and whether the ranks first make sure that they agree on these.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import silu

from seqpar.layout import SequenceLayout
from seqpar.models.layers import SimpleRMSNorm, lrpe, rotary, rotary_frequencies
from seqpar.ops.softmax import softmax_attention
from seqpar.ops.softmax_choice import Strategy
from seqpar.ops.state import state_attention

__all__ = ["LightningMixer", "SoftmaxMixer", "lightning_log_decay"]


def lightning_log_decay(num_heads: int, layer: int, num_layers: int) -> Tensor:
    """float32 [H]: log decay per head, -2^(-8(h+1)/H) (1 - l/(L-1) + 1e-5).

    ALiBi slopes, weaker in later layers, as in the code released with TransNormerLLM and
    Lightning Attention-2; the papers and other libraries use other conventions, which is why
    decay is an explicit argument of every operator here.
    """
    slopes = 2.0 ** (-8.0 * torch.arange(1, num_heads + 1, dtype=torch.float32) / num_heads)
    return -slopes * (1.0 - layer / max(num_layers - 1, 1) + 1e-5)


class LightningMixer(nn.Module):
    """Norm(lightning(silu(q), silu(k), v)) ⊙ gate, then the output projection (TransNormerLLM).

    Args:
        use_lrpe: rotate q and k by learned angles first (LRPE-d, for the first layer only).
    """

    log_decay_H: Tensor

    def __init__(
        self, dim: int, num_heads: int, head_dim: int, log_decay_H: Tensor, *, use_lrpe: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.projection = nn.Linear(dim, 4 * num_heads * head_dim, bias=False)
        self.norm = SimpleRMSNorm()
        self.output = nn.Linear(num_heads * head_dim, dim, bias=False)
        self.register_buffer("log_decay_H", log_decay_H, persistent=False)
        self.theta_HK: nn.Parameter | None = None
        if use_lrpe:
            frequencies = rotary_frequencies(2 * head_dim).expand(num_heads, head_dim)
            self.theta_HK = nn.Parameter(frequencies.clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LightningMixer:
        """Decays stay as they are in float32 when the model is cast: operators take no other."""
        exact_H = self.log_decay_H
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.log_decay_H.dtype != exact_H.dtype:
            self.log_decay_H = exact_H.to(self.log_decay_H.device)
        return self

    def forward(
        self,
        x_BTC: Tensor,
        positions_T: Tensor,
        *,
        layout: SequenceLayout,
        group: ProcessGroup | None,
        check: bool = True,
    ) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        projected = self.projection(x_BTC).unflatten(-1, (4, *heads))
        q_BTHK, k_BTHK, v_BTHK, gate_BTHK = projected.unbind(2)
        q_BTHK, k_BTHK = silu(q_BTHK) * self.head_dim**-0.5, silu(k_BTHK)
        if self.theta_HK is not None:
            q_BTHK = lrpe(q_BTHK, positions_T, self.theta_HK)
            k_BTHK = lrpe(k_BTHK, positions_T, self.theta_HK)
        mixed_BTHK, _ = state_attention(
            q_BTHK,
            k_BTHK,
            v_BTHK,
            log_decay=self.log_decay_H,
            layout=layout,
            group=group,
            check=check,
        )
        out: Tensor = self.output(self.norm(mixed_BTHK.flatten(2)) * gate_BTHK.flatten(2))
        return out


class SoftmaxMixer(nn.Module):
    """Causal grouped-query softmax attention with RoPE and an output gate."""

    frequencies: Tensor

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        strategy: Strategy = "auto",
    ) -> None:
        super().__init__()
        self.strategy: Strategy = strategy
        self.sizes = [num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim]
        self.head_dim = head_dim
        self.projection = nn.Linear(dim, sum(self.sizes) + self.sizes[0], bias=False)
        self.norm = SimpleRMSNorm()
        self.output = nn.Linear(self.sizes[0], dim, bias=False)
        self.register_buffer("frequencies", rotary_frequencies(head_dim), persistent=False)

    def forward(
        self,
        x_BTC: Tensor,
        positions_T: Tensor,
        *,
        layout: SequenceLayout,
        group: ProcessGroup | None,
        strategy: Strategy | None = None,
        check: bool = True,
    ) -> Tensor:
        parts = self.projection(x_BTC).split([*self.sizes, self.sizes[0]], dim=-1)
        q_BTHK, k_BTGK, v_BTGK = (part.unflatten(-1, (-1, self.head_dim)) for part in parts[:3])
        mixed_BTHK = softmax_attention(
            rotary(q_BTHK, positions_T, self.frequencies),
            rotary(k_BTGK, positions_T, self.frequencies),
            v_BTGK,
            layout=layout,
            group=group,
            strategy=strategy or self.strategy,
            check=check,
        )
        gated: Tensor = self.norm(mixed_BTHK.flatten(2)) * parts[3]
        out: Tensor = self.output(gated)
        return out
