"""The loss of rows of logits and its gradient, PyTorch's form and the kernel, against float64."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from seqpar.errors import KernelInputError
from seqpar.kernels.target_loss import target_loss
from tests.tolerances import RELATIVE, relative_error

kernel = pytest.importorskip("seqpar.kernels.target_loss_kernel")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IGNORED = -100


def _by_kernel(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    chosen: dict[str, Any] = {"gradient": None, "factor": 1.0, "cap": None, **options}
    nll: Tensor = kernel.target_loss_triton(logits, labels, ignore_index=IGNORED, **chosen)
    return nll


def _on_the_cpu(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return target_loss(logits, labels, **options)


WAYS: list[Any] = [_on_the_cpu]
if DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
    WAYS.append(_by_kernel)
Way = Callable[..., Tensor]


def _device(way: Way) -> str:
    return DEVICE if way is _by_kernel else "cpu"


def _case(num_rows: int, vocabulary: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 5 * torch.randn(num_rows, vocabulary, generator=generator)
    labels = torch.randint(vocabulary, (num_rows,), generator=generator)
    labels[::3] = IGNORED
    return logits.to(device, dtype), labels.to(device)


def _reference(logits: Tensor, labels: Tensor, factor: float, cap: float | None) -> Any:
    leaf = logits.detach().cpu().double().requires_grad_()
    x = leaf * factor
    x = x if cap is None else cap * torch.tanh(x / cap)
    nll = cross_entropy(x, labels.cpu(), ignore_index=IGNORED, reduction="none")
    (gradient,) = torch.autograd.grad(nll.sum(), leaf)
    return nll.detach(), gradient


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("factor", "cap"), [(1.0, None), (0.3, None), (1.7, 4.0)])
@pytest.mark.parametrize(("num_rows", "vocabulary"), [(7, 2), (5, 300), (4, 9001)])
def test_loss_and_gradient_in_the_logits_place(
    num_rows: int, vocabulary: int, factor: float, cap: float | None, dtype: torch.dtype, way: Way
) -> None:
    logits, labels = _case(num_rows, vocabulary, dtype, _device(way))
    expected_nll, expected = _reference(logits, labels, factor, cap)
    without = way(logits, labels, factor=factor, cap=cap)
    nll = way(logits, labels, gradient=logits, factor=factor, cap=cap)
    assert nll.dtype == torch.float32
    assert torch.equal(without, nll)
    assert relative_error(nll, expected_nll) < 1e-6
    assert relative_error(logits, expected) < RELATIVE[dtype]
    assert torch.equal(logits[::3].cpu().float(), torch.zeros_like(expected[::3]).float())


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_into_other_rows_leaves_the_logits(way: Way) -> None:
    logits, labels = _case(6, 50, torch.float32, _device(way))
    kept, room = logits.clone(), torch.full((6, 80), torch.nan, device=logits.device)
    weight = torch.tensor(-0.3, device=logits.device)
    way(logits, labels, gradient=room[:, :50], weight=weight)
    assert torch.equal(logits, kept)
    assert relative_error(room[:, :50], -0.3 * _reference(logits, labels, 1.0, None)[1]) < 1e-6
    assert room[:, 50:].isnan().all()


@pytest.mark.parametrize("way", WAYS)
def test_a_sure_target_keeps_its_digits(way: Way) -> None:
    """p - 1 of a p that float32 rounds to 1: the kernel sums the others, PyTorch cannot."""
    logits = torch.tensor([[20.0, 0.0, 1.0], [-40.0, 9.0, 0.0]], device=_device(way))
    labels = torch.tensor([0, 1], device=_device(way))
    _, expected = _reference(logits, labels, 1.0, None)
    way(logits, labels, gradient=logits)
    absolute = 1e-25 if way is _by_kernel else 1e-7
    assert ((logits.cpu() - expected).abs() <= 1e-5 * expected.abs() + absolute).all()
    assert -1e-8 < expected[0, 0] < 0


@pytest.mark.parametrize("way", WAYS)
def test_no_rows(way: Way) -> None:
    logits, labels = _case(0, 8, torch.float32, _device(way))
    assert way(logits, labels, gradient=logits).shape == (0,)


def test_what_does_not_fit_is_refused() -> None:
    logits, labels = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(KernelInputError, match=r"labels \[T\], got"):
        target_loss(logits, labels[:2])
    with pytest.raises(KernelInputError, match="dense rows"):
        target_loss(torch.zeros(4, 3).T, labels)
    with pytest.raises(KernelInputError, match="dense rows"):
        target_loss(logits, labels, gradient=torch.zeros(3, 5))
    with pytest.raises(KernelInputError, match=r"logits' torch.float32"):
        target_loss(logits, labels, gradient=logits.bfloat16())
