"""The loss of a linear LM head that never holds whole logits.

Forward computes a block of tokens' logits, their loss and their gradients while they exist, and
keeps only the gradients of the hidden states and the weight: the scheme of Liger-Kernel's fused
linear cross-entropy (arXiv 2410.10989). Two implementations give the same sum:

- the package's own: matrix products and `target_loss`, any device and dtype;
- Liger's Triton kernels, where liger-kernel is installed and the head is one that they compute
  exactly: bf16 or fp32 on CUDA, no factor on the logits. Its own mean is never used: the sum over
  the targets is, with fp32 sums for the weight, so that the mesh's mean is as exact.

Shape letters: T tokens of this rank, E hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqpar.errors import LayoutError, MissingExtraError
from seqpar.kernels.target_loss import target_loss
from seqpar.layout import IGNORE_INDEX
from seqpar.loss import check_labels

__all__ = ["HeadImplementation", "lm_head_loss_sum"]

HeadImplementation = Literal["auto", "seqpar", "liger"]
_LEAST_BLOCK = 1024  # tokens: products of fewer rows leave a GPU idle
_BLOCK_BYTES = 1 << 29  # of a block's logits at most


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
        block_tokens: tokens whose logits exist at one time. By default as many as the hidden size
            has entries, at least 1,024, at most 512 MiB of logits: in 16 bits they are then half
            of the weight's fp32 gradient, which every block reads and writes.
        implementation: "liger" asks for Liger's kernels, "seqpar" for the package's own; "auto"
            takes Liger's where they fit and no `block_tokens` is asked for.

    Memory beyond its arguments: one block of logits in the products' dtype (on the CPU their fp32
    log-probabilities too), and when gradients are wanted one tensor like `hidden`, an fp32 one like
    `weight` and, in backward, the weight's gradient in its own dtype. Under autocast the matrix
    products run in its dtype. The weight's and the bias' gradients are fp32 sums over blocks.
    Gradients are made in forward and given away in backward, once: `retain_graph` gives no second.

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
        block = block_tokens or _block_tokens(weight)
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


def _block_tokens(weight: Tensor) -> int:
    vocabulary, width = weight.shape
    most = _BLOCK_BYTES // (vocabulary * weight.element_size())
    return max(1, min(max(_LEAST_BLOCK, width), most))


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
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[:3]]
        sums = _HeadGradients.of(hidden, weight, bias, wanted)
        total = hidden.new_zeros((), dtype=_wide(hidden))
        for start in range(0, len(hidden), block_tokens):
            block = slice(start, start + block_tokens)
            part = hidden[block]
            logits = part @ weight.T if bias is None else torch.addmm(bias, part, weight.T)
            slopes = logits if any(wanted) else None
            total += target_loss(
                logits,
                labels[block],
                gradient=slopes,
                ignore_index=IGNORE_INDEX,
                factor=scale,
                cap=softcap,
            ).sum()
            if slopes is not None:
                sums.add(block, slopes, part, weight)
        ctx.sums = sums  # no saved tensors: backward scales them where they are
        ctx.dtypes = [None if x is None else x.dtype for x in (hidden, weight, bias)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor | None, ...]:
        sums, ctx.sums = ctx.sums, None
        if sums is None:
            raise RuntimeError(
                "the gradients of the head's loss are made once, in forward, and backward has "
                "taken them: run forward again"
            )
        return (*sums.scaled(grad_sum, ctx.dtypes), None, None, None, None, None)


class _HeadGradients(NamedTuple):
    """Gradients of the hidden states [T, E], the weight [V, E] and the bias [V], if wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: list[bool]
    ) -> _HeadGradients:
        wide = _wide(hidden)
        return cls(
            torch.empty_like(hidden) if wanted[0] else None,
            torch.zeros_like(weight, dtype=wide) if wanted[1] else None,
            torch.zeros_like(bias, dtype=wide) if bias is not None and wanted[2] else None,
        )

    def add(self, block: slice, slopes: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """A block's part, from its logits' gradient [t, V]."""
        if self.hidden is not None:
            torch.mm(slopes, weight, out=self.hidden[block])
        if self.weight is not None:
            _add_product(self.weight, slopes.T, hidden)
        if self.bias is not None:
            self.bias.add_(slopes.sum(0, dtype=self.bias.dtype))

    def scaled(self, factor: Tensor, dtypes: list[torch.dtype | None]) -> Iterator[Tensor | None]:
        """Times the factor, in place, in the arguments' dtypes."""
        for gradient, dtype in zip(self, dtypes, strict=True):
            yield None if gradient is None else gradient.mul_(factor).to(dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b; on CUDA a 16-bit product is added before it is rounded."""
    if total.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
