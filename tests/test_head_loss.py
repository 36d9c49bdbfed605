"""The loss of an LM head without its logits: against cross-entropy, Liger's kernels too."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from seqpar import head_loss
from seqpar.errors import LayoutError, MissingExtraError
from seqpar.head_loss import lm_head_loss_sum
from seqpar.layout import IGNORE_INDEX
from tests.loss_cases import loss_inputs, reference_sum
from tests.tolerances import RELATIVE, relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (0.7, 3.0)])
@pytest.mark.parametrize("num_tokens", [0, 1, 23])
def test_head_loss_equals_cross_entropy_of_its_logits(
    dtype: torch.dtype, scale: float, softcap: float | None, num_tokens: int
) -> None:
    hidden, weight, bias, labels = (x.to(DEVICE) for x in loss_inputs(num_tokens, dtype))
    arguments = [x.requires_grad_() for x in (hidden, weight, bias)]
    nll, count = lm_head_loss_sum(
        hidden, weight, labels, bias=bias, scale=scale, softcap=softcap, block_tokens=5
    )
    (nll / 7).backward()
    h, w, b = references = [x.detach().double().requires_grad_() for x in arguments]
    logits = scale * (h @ w.T + b)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = reference_sum(logits, labels)
    (expected / 7).backward()
    assert count.item() == (labels != IGNORE_INDEX).sum()
    assert relative_error(nll, expected) <= RELATIVE[dtype]
    for name, ours, theirs in zip(("hidden", "weight", "bias"), arguments, references, strict=True):
        assert ours.grad.dtype == dtype
        assert relative_error(ours.grad, theirs.grad) <= RELATIVE[dtype], name


def test_head_loss_without_bias_autocast_and_frozen_weight() -> None:
    hidden, weight, _, labels = loss_inputs(11)
    hidden.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        nll, _ = lm_head_loss_sum(hidden, weight, labels)
    nll.backward()
    reference = hidden.detach().double().requires_grad_()
    expected = reference_sum(reference @ weight.double().T, labels)
    expected.backward()
    assert relative_error(nll, expected) <= RELATIVE[torch.bfloat16]
    assert relative_error(hidden.grad, reference.grad) <= RELATIVE[torch.bfloat16]
    assert hidden.grad.dtype == torch.float32
    with torch.no_grad():
        quiet, _ = lm_head_loss_sum(hidden, weight, labels)
    assert relative_error(quiet, expected) < 1e-6


def test_head_loss_never_holds_whole_logits() -> None:
    """The largest tensor that its forward and backward make is far smaller than the logits."""
    num_tokens, vocab, block = 512, 4096, 16
    hidden = torch.randn(1, num_tokens, 8, requires_grad=True)
    weight = torch.randn(vocab, 8, requires_grad=True)
    labels = torch.randint(0, vocab, (1, num_tokens))
    with torch.profiler.profile(profile_memory=True) as profile:
        nll, _ = lm_head_loss_sum(hidden, weight, labels, block_tokens=block)
        nll.backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 4 * block * vocab <= largest <= 4 * 4 * block * vocab
    assert largest < num_tokens * vocab * 4 / 8


def test_blocks_follow_the_hidden_size_within_bounds() -> None:
    def tokens(vocabulary: int, width: int, dtype: torch.dtype) -> int:
        return head_loss._block_tokens(torch.empty(vocabulary, width, dtype=dtype, device="meta"))

    assert tokens(32768, 2048, torch.bfloat16) == 2048
    assert tokens(131072, 2048, torch.bfloat16) == 2048
    assert tokens(131072, 8192, torch.bfloat16) == 2048  # 512 MiB
    assert tokens(131072, 4096, torch.float32) == 1024
    assert tokens(32768, 256, torch.float32) == 1024
    assert tokens(1 << 30, 8, torch.float32) == 1


def test_gradients_are_given_away_once() -> None:
    """Backward scales them in place; a second one would scale them again."""
    hidden, weight, _, labels = loss_inputs(5)
    nll, _ = lm_head_loss_sum(hidden.requires_grad_(), weight, labels)
    nll.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="run forward again"):
        nll.backward()


# -- Liger's kernels ------------------------------------------------------------------------------


def _gradients(loss: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    # The mesh's mean multiplies the sum by a factor, which Liger's backward must carry.
    return torch.autograd.grad(loss * 0.37, leaves)


# Triton's interpreter truncates to bf16 where a GPU rounds, and cannot run the cap.
@pytest.mark.parametrize(
    ("dtype", "softcap"),
    [
        (torch.float32, None),
        pytest.param(torch.float32, 3.0, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, None, marks=pytest.mark.gpu),
        pytest.param(torch.bfloat16, 3.0, marks=pytest.mark.gpu),
    ],
)
def test_ligers_sum_is_our_sum(dtype: torch.dtype, softcap: float | None) -> None:
    """Its sum, not its mean: with our own count it is exact on any split."""
    pytest.importorskip("liger_kernel")
    if DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("Liger's kernels need CUDA or Triton's interpreter")
    hidden, weight, _, labels = (x.to(DEVICE) for x in loss_inputs(23, dtype))
    hidden, labels = hidden[0].requires_grad_(), labels[0]
    weight.requires_grad_()
    fused = head_loss._liger_sum(hidden, weight, None, labels, softcap)
    h, w = references = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = h @ w.T
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    expected = reference_sum(logits, labels)
    assert relative_error(fused, expected) <= RELATIVE[dtype]
    pairs = zip(_gradients(fused, hidden, weight), _gradients(expected, *references), strict=True)
    for ours, theirs in pairs:
        assert relative_error(ours, theirs) <= RELATIVE[dtype]


@pytest.mark.gpu
def test_liger_is_chosen_where_it_fits_and_agrees(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("liger_kernel")
    asked = []
    fused = head_loss._liger_sum
    monkeypatch.setattr(head_loss, "_liger_sum", lambda *a: (asked.append(len(a[0])), fused(*a))[1])
    hidden, weight, bias, labels = (x.cuda() for x in loss_inputs(23, torch.bfloat16))
    hidden.requires_grad_(), weight.requires_grad_()
    sums = {
        name: lm_head_loss_sum(hidden, weight, labels, bias=bias, implementation=name)[0]  # type: ignore[arg-type]
        for name in ("auto", "seqpar")
    }
    assert asked == [23]
    assert relative_error(sums["auto"], sums["seqpar"]) <= RELATIVE[torch.bfloat16]
    lm_head_loss_sum(hidden, weight, labels, scale=0.5)
    lm_head_loss_sum(hidden[:, :0], weight, labels[:, :0], implementation="liger")
    assert asked == [23]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scale": 0.5}, "factor on logits"),
        ({"block_tokens": 4}, "its own blocks"),
        ({"dtype": torch.float16}, "one dtype"),
        ({"frozen": True}, "no gradient where the hidden states need none"),
    ],
)
def test_what_liger_does_not_compute_exactly_is_refused(change: dict[str, Any], why: str) -> None:
    pytest.importorskip("liger_kernel")
    options = {key: change[key] for key in ("scale", "block_tokens") if key in change}
    hidden, weight, _, labels = (x.cuda() for x in loss_inputs(5, torch.bfloat16))
    hidden, weight = hidden.to(change.get("dtype")), weight.to(change.get("dtype"))
    hidden.requires_grad_(not change.get("frozen", False))
    weight.requires_grad_()
    with pytest.raises(LayoutError, match=why):
        lm_head_loss_sum(hidden, weight, labels, implementation="liger", **options)


def test_asking_for_liger_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, _, labels = loss_inputs(5)
    monkeypatch.setattr(head_loss, "_liger_installed", lambda: True)
    with pytest.raises(LayoutError, match="run on CUDA, the hidden states are on cpu"):
        lm_head_loss_sum(hidden, weight, labels, implementation="liger")
    with pytest.raises(LayoutError, match="no implementation 'fused'"):
        lm_head_loss_sum(hidden, weight, labels, implementation="fused")  # type: ignore[arg-type]
    monkeypatch.setattr(head_loss, "_liger_installed", lambda: False)
    with pytest.raises(MissingExtraError, match=r"seqpar\[liger\]"):
        lm_head_loss_sum(hidden, weight, labels, implementation="liger")
