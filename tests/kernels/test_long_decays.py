"""The gradient of decays per token stays as exact in a long document as in a short one.

It is a running sum in which all cancels but what crosses a token. Mamba-2's A_log and dt_bias sum
it over all tokens once more, so errors that add up along a document would show there first.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from seqpar.kernels.lightning import lightning_attention
from tests.tolerances import relative_error


def _decay_gradient(tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """By token, and summed as A_log sums it: dlog_decay times log_decay, for each head."""
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, tokens, 2, *shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v, do = (random(16).requires_grad_() for _ in range(4))
    decay = (-0.1 * random().sigmoid()).detach().requires_grad_()
    o, _ = lightning_attention(q, k, v, log_decay=decay)
    (gradient,) = torch.autograd.grad(o, decay, do)
    return gradient, (gradient.double() * decay.double()).sum((0, 1))


@pytest.mark.parametrize("tokens", [300, 20_000])
def test_errors_do_not_add_up_along_a_document(tokens: int) -> None:
    by_token, summed = _decay_gradient(tokens, torch.float32)
    exact_by_token, exact_summed = _decay_gradient(tokens, torch.float64)
    assert relative_error(by_token, exact_by_token) < 1e-6
    assert relative_error(summed, exact_summed) < 5e-6
