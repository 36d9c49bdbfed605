"""Inputs of the losses, and torch's own cross-entropy of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from seqpar.layout import IGNORE_INDEX

VOCAB, HIDDEN = 37, 12


def loss_inputs(num_tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states [1, T, E], weight [V, E], bias [V], labels [1, T], every fifth no target."""
    generator = torch.Generator().manual_seed(num_tokens)
    hidden = torch.randn(1, num_tokens, HIDDEN, generator=generator).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).to(dtype)
    bias = torch.randn(VOCAB, generator=generator).to(dtype)
    labels = torch.randint(0, VOCAB, (1, num_tokens), generator=generator)
    labels[0, ::5] = IGNORE_INDEX
    return hidden, weight, bias, labels


def reference_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum over targets in float64."""
    return functional.cross_entropy(
        logits.flatten(0, -2).double(), labels.flatten(), reduction="sum"
    )
