"""Pieces as scattered layers use them, ahead of the rest or without what nobody takes; very many
sequences; tensors on any device.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from seqpar.kernels.launch import Launch
from seqpar.kernels.lightning import (
    attend,
    attend_backward,
    key_value_summary,
    lightning_attention,
    lightning_step,
    query_grad,
    query_grad_summary,
)
from seqpar.layout import SequenceLayout
from seqpar.ops.state import state_attention


@pytest.mark.parametrize("dims", [(64, 64), (20, 36)], ids=["whole", "padded"])
@pytest.mark.parametrize("decays", [True, False], ids=["fixed", "none"])
def test_pieces_ahead_give_the_same_bits(
    decays: bool, dims: tuple[int, int], triton_device: str
) -> None:
    device = triton_device
    torch.manual_seed(0)
    tokens = 1100 if device == "cuda" else 300  # either is cut into several segments
    q, k = (torch.randn(1, tokens, 2, dims[0], device=device) for _ in range(2))
    v, do = (torch.randn(1, tokens, 2, dims[1], device=device) for _ in range(2))
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


def test_training_after_a_first_call_in_inference_mode(triton_device: str) -> None:
    layout = SequenceLayout.contiguous((0, 47), 1)
    x = torch.randn(1, 47, 2, 16, device=triton_device)

    def attend_to(x: torch.Tensor) -> torch.Tensor:
        return state_attention(x, x, x, log_decay=None, layout=layout, group=None)[0]

    with torch.inference_mode():
        expected = attend_to(x)
    leaf = x.clone().requires_grad_()
    o = attend_to(leaf)
    o.sum().backward()
    assert torch.equal(o, expected)
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_very_many_sequences_fit_into_a_grid(
    triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A grid has 65,535 programs along its second and third dim; launches are not carried out."""
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(Launch, "__call__", lambda self, *_: grids.append(self._grid))
    device = triton_device
    x = torch.zeros(1, 70_000, 2, 16, device=device)
    each = torch.arange(70_001, dtype=torch.int32)
    for log_decay in (-torch.ones(2, device=device), -torch.ones(1, 70_000, 2, device=device)):
        summary = key_value_summary(x, x, log_decay=log_decay, cu_seqlens=each)
        attend(x, x, x, summary, log_decay=log_decay, cu_seqlens=each)
        grads = query_grad_summary(x, x, log_decay=log_decay, cu_seqlens=each)
        attend_backward(x, x, x, x, summary, grads, log_decay=log_decay, cu_seqlens=each)
    rows = torch.zeros(70_000, 70, 1, 16, device=device)
    key_value_summary(rows, rows, log_decay=torch.zeros(1, device=device))
    token = torch.zeros(1024, 1, 65, 16, device=device)
    lightning_step(token, token, token, torch.zeros(1024, 65, 16, 16, device=device))
    assert len(grids) >= 14
    assert all(max(grid[1:], default=1) <= 65_535 for grid in grids)


@pytest.mark.multigpu
@pytest.mark.parametrize("kind", ["none", "fixed", "token"])
def test_tensors_may_lie_on_another_device_than_the_current_one(kind: str) -> None:
    def results(device: str) -> list[torch.Tensor]:
        numbers = torch.Generator().manual_seed(0)
        q, k, v, do = (torch.randn(1, 900, 2, 128, generator=numbers) for _ in range(4))
        leaves = [x.bfloat16().to(device).requires_grad_() for x in (q, k, v)]
        decay = None
        if kind != "none":
            shape = (2,) if kind == "fixed" else (1, 900, 2)
            decay = (-torch.rand(shape, generator=numbers) / 50).to(device)
        found = []
        for _ in range(2):  # through Triton, then past it
            o, state = lightning_attention(*leaves, log_decay=decay, return_final_state=True)
            grads = torch.autograd.grad(o, leaves, do.bfloat16().to(device))
            token = (x[:, :1].detach().contiguous() for x in leaves)
            first = decay[:, :1] if kind == "token" else decay
            step, _ = lightning_step(*token, state, log_decay=first)
            found += [o, state, *grads, step]
        return [x.detach().cpu() for x in found]

    assert torch.cuda.current_device() == 0
    for one, other in zip(results("cuda:1"), results("cuda:0"), strict=True):
        assert torch.equal(one, other)
