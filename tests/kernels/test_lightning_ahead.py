"""The gradient of q ahead of the rest, and summaries that leave out what nobody takes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from seqpar.kernels.lightning import (
    attend,
    attend_backward,
    key_value_summary,
    query_grad,
    query_grad_summary,
)
from seqpar.kernels.lightning.plan import Plan


@pytest.mark.parametrize("dims", [(64, 64), (20, 36)], ids=["whole", "padded"])
@pytest.mark.parametrize("decays", [True, False], ids=["fixed", "none"])
def test_pieces_ahead_give_the_same_bits(
    decays: bool, dims: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            pytest.skip("Triton needs a GPU, or TRITON_INTERPRET=1 before it is imported")
        made = Plan.__init__

        def on_triton(self: Plan, problem: Any) -> None:
            made(self, problem)
            self.on_triton = True

        monkeypatch.setattr(Plan, "__init__", on_triton)
    torch.manual_seed(0)
    q, k = (torch.randn(1, 1100, 2, dims[0], device=device) for _ in range(2))
    v, do = (torch.randn(1, 1100, 2, dims[1], device=device) for _ in range(2))
    log_decay = -torch.rand(2, device=device) / 100 if decays else None
    entry, exit_grad = (torch.randn(1, 2, *dims, device=device) for _ in range(2))

    def results(leaving: bool, ahead: bool) -> list[torch.Tensor]:
        summary = key_value_summary(k, v, log_decay=log_decay, leaving=leaving)
        o = attend(q, k, v, summary, log_decay=log_decay, entry_state=entry)
        grads = query_grad_summary(q, do, log_decay=log_decay, leaving=leaving)
        dq = None
        if ahead:
            dq = query_grad(q, k, v, do, summary, log_decay=log_decay, entry_state=entry)
            assert dq is not None
        dq, dk, dv, _ = attend_backward(
            q, k, v, do, summary, grads, log_decay=log_decay,
            entry_state=entry, exit_state_grad=exit_grad, query_grad=dq,
        )  # fmt: skip
        return [o, dq, dk, dv]

    expected = results(True, False)
    for found, other in zip(results(False, True), expected, strict=True):
        assert torch.equal(found, other)
