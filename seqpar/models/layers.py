"""The small layers that TransNormerLLM and the MiniMax-style hybrid are made of.

Shape letters: B batch, T tokens on this rank, C channels, H heads, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SimpleGatedUnit", "SimpleRMSNorm", "lrpe", "rotary", "rotary_frequencies"]


class SimpleRMSNorm(nn.Module):
    """x / rms(x) over the last dim, without a gain (SRMSNorm, TransNormerLLM, eq. 8).

    Args:
        eps: added to the mean square, computed in float32.
    """

    def __init__(self, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class SimpleGatedUnit(nn.Module):
    """(x W_v ⊙ x W_u) W_o: a gated feed-forward with no activation (SGLU, TransNormerLLM)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.value_and_gate = nn.Linear(dim, 2 * hidden, bias=False)
        self.output = nn.Linear(hidden, dim, bias=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        value, gate = self.value_and_gate(x_BTC).chunk(2, dim=-1)
        out: Tensor = self.output(value * gate)
        return out


def rotary_frequencies(head_dim: int, base: float = 10_000.0) -> Tensor:
    """float32 [head_dim / 2]: base^(-2i/head_dim), the frequencies of RoPE."""
    return base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)


def rotary(x_BTHK: Tensor, positions_T: Tensor, frequencies: Tensor) -> Tensor:
    """RoPE: rotate the pairs (i, i + K/2) by position x frequency; angles in float32.

    `positions_T` are positions within each document, so that a rank needs no neighbour.
    """
    angles = positions_T.float()[:, None, None] * frequencies
    cos, sin = angles.cos().to(x_BTHK.dtype), angles.sin().to(x_BTHK.dtype)
    left, right = x_BTHK.chunk(2, dim=-1)
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=-1)


def lrpe(x_BTHK: Tensor, positions_T: Tensor, theta_HK: Tensor) -> Tensor:
    """LRPE with a learned angle per head and channel: [B, T, H, 2K] = [x cos, x sin].

    The inner product of two such vectors at t and s is Σ q k cos(θ (t - s)), the relative part
    of LRPE-d; the decay λ^(t-s) is the attention's own (TransNormerLLM, eq. 3).
    """
    angles = positions_T.float()[:, None, None] * theta_HK.float()
    cos, sin = angles.cos().to(x_BTHK.dtype), angles.sin().to(x_BTHK.dtype)
    return torch.cat([x_BTHK * cos, x_BTHK * sin], dim=-1)
