"""What a state adds to tokens: the kernel, and the plain form, against the whole product."""

from __future__ import annotations

import os

import pytest
import torch

from seqpar.kernels import entry_product
from seqpar.kernels.entry_product import LOG_FLOOR, add_entry_product, reached_tokens
from seqpar.ops.state_lightning import fixed_on_host
from tests.tolerances import assert_close

B, T, H, X, Y = 2, 150, 4, 20, 70
DECAYS = (0.0, -0.02, -0.4, -torch.inf)


@pytest.mark.parametrize("from_end", [False, True])
@pytest.mark.parametrize("kernel", [False, True], ids=["plain", "triton"])
def test_only_reached_tokens_are_added_to(kernel: bool, from_end: bool) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if kernel and device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1 before it is imported")
    x = torch.randn(B, T, H, X, device=device)
    matrix = torch.randn(B, H, Y, X, device=device).mT
    before = torch.randn(B, T, 2 * H, Y, device=device)
    out = before.clone()
    log_decay = torch.tensor(DECAYS, device=device)
    on_host = fixed_on_host(log_decay)
    assert on_host is not None
    if kernel:
        entry_product._launch(out[:, :, ::2], x, matrix, log_decay, T, from_end)
    else:
        add_entry_product(
            out[:, :, ::2], x, matrix, log_decay=log_decay, on_host=on_host, from_end=from_end
        )
    steps = torch.arange(T, device=device)
    steps = steps.flip(0) if from_end else steps + 1
    log_reach = steps[:, None] * log_decay.double().clamp(min=-100.0)
    whole = torch.einsum("bthx,bhxy->bthy", x.double(), matrix.double())
    added = torch.where(log_reach >= LOG_FLOOR, log_reach.exp(), 0.0)[None, :, :, None] * whole
    assert_close(out[:, :, ::2], before[:, :, ::2] + added, what="sum")
    assert torch.equal(out[:, :, 1::2], before[:, :, 1::2])
    untouched = log_reach < LOG_FLOOR
    assert untouched.sum() > T
    assert torch.equal(out[:, :, ::2][:, untouched], before[:, :, ::2][:, untouched])


def test_reach_is_where_the_decay_crosses_the_floor() -> None:
    assert reached_tokens(0.0, 10) == 10
    assert reached_tokens(-20.0, 10) == 0
    count = reached_tokens(-0.3, 1000)
    assert -0.3 * count >= LOG_FLOOR > -0.3 * (count + 1)
