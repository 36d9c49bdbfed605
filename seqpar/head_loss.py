"""The loss of a linear LM head that never holds whole logits.

Forward computes a block of tokens' logits, their loss and their gradients while they exist, and
keeps only the gradients of the hidden states and the weight: the scheme of Liger-Kernel's fused
linear cross-entropy (arXiv 2410.10989). Two implementations give the same sum:

- the package's own: PyTorch operations, any device and dtype;
- Liger's Triton kernels, where liger-kernel is installed and the head is one that they compute
  exactly: bf16 or fp32 on CUDA, no factor on the logits. Its own mean is never used: the sum over
  the targets is, with fp32 sums for the weight, so that the mesh's mean is as exact.

Shape letters: T tokens of this rank, E hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.errors import LayoutError, MissingExtraError
from seqpar.layout import IGNORE_INDEX
from seqpar.loss import check_labels

__all__ = ["HeadImplementation", "lm_head_loss_sum"]

HeadImplementation = Literal["auto", "seqpar", "liger"]
_BLOCK_LOGITS = 1 << 26  # elements of a block's fp32 logits: 256 MiB, 512 tokens of 131,072


def lm_head_loss_sum(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    block_tokens: int | None = None,
    implementation: HeadImplementation = "auto",
) -> tuple[Tensor, Tensor]:
    """As `token_loss_sum` of the logits hidden @ weight.T + bias, which are never held whole.

    Args:
        hidden: [..., E] this rank's last hidden states.
        weight: [V, E] of the LM head; bias [V].
        labels: int64 [...].
        scale: the logits are multiplied by it.
        softcap: if given, logits become softcap * tanh(logits / softcap), after the scale.
        block_tokens: tokens whose logits exist at one time; by default 256 MiB of them in fp32.
        implementation: "liger" asks for Liger's kernels, "seqpar" for the package's own; "auto"
            takes Liger's where they fit and no `block_tokens` is asked for.

    Memory beyond its arguments: one block of logits and of their fp32 log-probabilities, and when
    gradients are wanted one tensor like `hidden` and an fp32 one like `weight`. Under autocast the
    matrix products run in its dtype. Gradients are fp32 sums over blocks, returned in the
    arguments' dtypes.

    Raises:
        LayoutError: labels of another shape than the hidden states' tokens, or "liger" for a head
            that it does not compute exactly.
        MissingExtraError: "liger", and liger-kernel is not installed.
    """
    check_labels("hidden states", hidden, labels)
    targets = (labels != IGNORE_INDEX).sum()
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    rows, aligned = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    problem = _why_not_liger(rows, weight, bias, scale, block_tokens)
    with torch.autocast(device_type, enabled=False):
        if _choose(implementation, problem) == "liger":
            return _liger_sum(rows, weight, bias, aligned, softcap), targets
        block = block_tokens or max(1, _BLOCK_LOGITS // weight.shape[0])
        wanted = torch.is_grad_enabled()
        nll_sum: Tensor = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            rows, weight, bias, aligned, scale, softcap, block, wanted
        )
    return nll_sum, targets


# -- Liger's kernels ------------------------------------------------------------------------------


@functools.cache
def _liger_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _why_not_liger(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, block_tokens: int | None
) -> str | None:
    """What Liger's kernels would not compute exactly, or not at all; None if they fit."""
    dtypes = {x.dtype for x in (hidden, weight, bias) if x is not None}
    if hidden.device.type != "cuda":
        return f"its kernels run on CUDA, the hidden states are on {hidden.device.type}"
    if dtypes not in ({torch.bfloat16}, {torch.float32}):
        # float16: the sum's gradient overflows before the mean's factor makes it small.
        return f"it needs one dtype, bfloat16 or float32, got {sorted(map(str, dtypes))}"
    if scale != 1.0:
        return f"it has no factor on logits, got scale {scale}"
    if block_tokens is not None:
        return "it chooses its own blocks: leave out block_tokens"
    if torch.is_grad_enabled() and weight.requires_grad and not hidden.requires_grad:
        return "it gives the weight no gradient where the hidden states need none"
    return None if len(hidden) else "this rank holds no token"


def _choose(implementation: HeadImplementation, problem: str | None) -> str:
    if implementation not in get_args(HeadImplementation):
        known = ", ".join(get_args(HeadImplementation))
        raise LayoutError(
            f"no implementation {implementation!r} of the head's loss: one of {known}"
        )
    if implementation == "auto":
        return "liger" if problem is None and _liger_installed() else "seqpar"
    if implementation == "liger":
        if not _liger_installed():
            raise MissingExtraError("liger_kernel", "liger", "the fused loss of the LM head")
        # An empty rank has nothing to fuse and must not stop the others.
        if problem is not None and "no token" not in problem:
            raise LayoutError(f"Liger's fused loss does not fit: {problem}")
        return "seqpar" if problem else "liger"
    return "seqpar"


def _liger_sum(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, softcap: float | None
) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE_INDEX, reduction="sum", softcap=softcap, accum_dtype=torch.float32
    )
    nll_sum: Tensor = fused(weight, hidden, labels, bias)
    return nll_sum


# -- the package's own ----------------------------------------------------------------------------


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients in forward, block by block, while a block's logits exist."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
        block_tokens: int,
        with_gradients: bool,
    ) -> Tensor:
        accumulate = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=accumulate)
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        d_hidden = torch.empty_like(hidden) if wanted[0] else None
        d_weight = torch.zeros_like(weight, dtype=accumulate) if wanted[1] else None
        d_bias = None
        if bias is not None and wanted[2]:
            d_bias = torch.zeros_like(bias, dtype=accumulate)
        for start in range(0, len(hidden), block_tokens):
            block = slice(start, start + block_tokens)
            part, target = hidden[block], (labels[block] != IGNORE_INDEX)[:, None]
            raw = part @ weight.T if bias is None else torch.addmm(bias, part, weight.T)
            nll, d_logits = _block(raw, labels[block], scale, softcap, any(wanted))
            total += nll
            if d_logits is None:
                continue
            # Rows that are no target are zeroed in [T, E], which is smaller than [T, V].
            if d_hidden is not None:
                d_hidden[block] = torch.mm(d_logits, weight).mul_(target)
            if d_weight is not None:
                _add_product(d_weight, d_logits.T, part * target)
            if d_bias is not None:
                d_bias += torch.where(target, d_logits, 0).sum(0, dtype=accumulate)
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (
            None if gradient is None else (gradient * grad_sum).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*gradients, None, None, None, None, None)


def _block(
    raw: Tensor, labels: Tensor, scale: float, softcap: float | None, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The sum over targets, and softmax - one-hot of every row in the logits' own memory.

    Args:
        raw: [T, V] hidden @ weight.T + bias, overwritten.
        labels: [T].

    The logits are read and written as few times as PyTorch's kernels allow: memory bounds this.
    """
    accumulate = torch.promote_types(raw.dtype, torch.float32)
    logits, slope = raw, None
    if scale != 1.0 or softcap is not None:
        logits = raw.to(accumulate) * scale
        slope = torch.full_like(logits[:, :1], scale)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
        slope = scale * (1 - (logits / softcap).square())
    log_weights = torch.log_softmax(logits, -1, dtype=accumulate)
    index = labels.clamp(min=0)[:, None]
    chosen = log_weights.gather(-1, index)
    nll = -torch.where(labels != IGNORE_INDEX, chosen[:, 0], 0).sum()
    if not with_gradient:
        return nll, None
    if slope is None:
        torch.exp(log_weights, out=raw)
        return nll, raw.scatter_(-1, index, torch.expm1(chosen).to(raw.dtype))
    gradient = log_weights.exp_().scatter_(-1, index, torch.expm1(chosen))
    return nll, raw.copy_(gradient.mul_(slope))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on CUDA a 16-bit product is added before it is rounded."""
    if total.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
