"""Token-weighted loss that equals one device's, however the tokens are split over ranks.

A rank's mean is not the mean: ranks hold different numbers of target tokens. So every rank sums
its negative log-likelihoods, and the sum is divided by the number of targets over the whole mesh.

`token_loss_sum` computes in fp32, on the CPU by blocks of tokens, and keeps nothing but the logits;
seqpar/head_loss.py takes the hidden states instead and never holds whole logits.

Shape letters: T tokens of this rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import DeviceMesh

from seqpar.batch import Batch
from seqpar.comm import all_reduce_sum
from seqpar.errors import DataError, LayoutError
from seqpar.kernels.target_loss import target_loss
from seqpar.layout import IGNORE_INDEX

__all__ = [
    "chunked_token_loss",
    "count_targets",
    "mean_over_mesh",
    "token_loss",
    "token_loss_sum",
    "trainer_loss",
]

GradReduction = Literal["mean", "sum"]
_BLOCK_LOGITS = 1 << 26  # elements of a block's fp32 logits on the CPU: 256 MiB


def token_loss(
    logits: Tensor,
    batch: Batch,
    *,
    mesh: DeviceMesh | None = None,
    num_targets: int | None = None,
    grad_reduction: GradReduction = "mean",
) -> Tensor:
    """The mean loss over all target tokens of the mesh, in nats a token.

    Args:
        logits: [1, T, V] (or [T, V]) of this rank's tokens.
        batch: what the logits were computed from.
        mesh: the whole mesh, dp and sp: every rank whose tokens count. None: the batch's group.
        num_targets: what to divide by, if not this micro-batch's own number of targets over the
            mesh: under gradient accumulation, `count_targets` of all the step's micro-batches.
        grad_reduction: what is done to gradients over the mesh afterwards: "mean" where they are
            averaged (fully_shard over all ranks of the mesh, DDP), "sum" where they are summed.

    Returns:
        0-dim float32, the same value on every rank. After the reduction named, each parameter's
        gradient is that of the one-device mean. NaN if nothing is a target, as torch's own mean.

    Raises:
        LayoutError: logits of another number of tokens than the batch.
    """
    nll_sum, local_targets = token_loss_sum(logits, batch.labels)
    return mean_over_mesh(
        nll_sum,
        local_targets,
        mesh=batch.group if mesh is None else mesh,
        num_targets=num_targets,
        grad_reduction=grad_reduction,
    )


def chunked_token_loss(
    model: nn.Module,
    batch: Batch,
    *,
    mesh: DeviceMesh | None = None,
    num_targets: int | None = None,
    grad_reduction: GradReduction = "mean",
    implementation: str = "auto",
) -> Tensor:
    """`token_loss` of a wrapped Hugging Face causal model that never holds whole logits.

    Runs the model's forward with the head replaced by `lm_head_loss_sum`, final soft cap included.

    Args:
        model: wrapped by `parallelize`; `fully_shard` and DDP may be around it.
        batch: this rank's.
        implementation: "auto", "seqpar" or "liger", as `lm_head_loss_sum` takes it. The other
            arguments are those of `token_loss`.

    Raises:
        UnsupportedModelError: the head is not one linear layer (the message says what to use).
        LayoutError: a model of one's own: it calls `lm_head_loss_sum` and `mean_over_mesh`.
    """
    nll_sum, local_targets = model(
        **batch.inputs, head_labels=batch.labels, head_implementation=implementation
    )
    return mean_over_mesh(
        nll_sum,
        local_targets,
        mesh=batch.group if mesh is None else mesh,
        num_targets=num_targets,
        grad_reduction=grad_reduction,
    )


def trainer_loss(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """transformers' `Trainer(compute_loss_func=trainer_loss)`: this rank's share of the mean.

    The Trainer counts the step's targets over all ranks and micro-batches, and multiplies by the
    ranks what DDP's average takes away (`average_tokens_across_devices`, on by default). When it
    evaluates, it averages over ranks after leaving out some that padded the last batch: without a
    gradient every rank gets the same share, and its `eval_loss` is the mean of its steps' means.

    Args:
        outputs: with `.logits` [1, T, V].
        labels: [1, T] of this rank, as `TrainerLoader` gives them.
        num_items_in_batch: the step's targets.

    Raises:
        DataError: the Trainer did not count them; the loss would depend on the split.
    """
    if num_items_in_batch is None:
        raise DataError("the Trainer counted no targets: leave average_tokens_across_devices on")
    nll_sum, _ = token_loss_sum(outputs.logits, labels)
    if not torch.is_grad_enabled() and dist.is_initialized():
        nll_sum = all_reduce_sum(nll_sum, dist.group.WORLD) / dist.get_world_size()
    return nll_sum / num_items_in_batch


def token_loss_sum(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of -log p(label) over this rank's targets, and their number.

    Args:
        logits: [..., V], any float dtype; log-sum-exp and sum are fp32 (fp64 for fp64 logits).
        labels: int64 [...], aligned with the logits; IGNORE_INDEX is no target.

    Returns:
        (0-dim fp32, differentiable in the logits; 0-dim int64). Zero tokens give a zero that is
        still part of the graph, so that backward reaches every collective on every rank.

    Raises:
        LayoutError: labels of another shape than the logits' tokens.
    """
    check_labels("logits", logits, labels)
    nll_sum: Tensor = _LogitsLoss.apply(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))  # type: ignore[no-untyped-call]
    return nll_sum, (labels != IGNORE_INDEX).sum()


def mean_over_mesh(
    nll_sum: Tensor,
    local_targets: Tensor,
    *,
    mesh: DeviceMesh | dist.ProcessGroup | None,
    num_targets: int | None = None,
    grad_reduction: GradReduction = "mean",
) -> Tensor:
    """Each rank's (sum, number of targets) -> the mean over the mesh; see `token_loss`."""
    if grad_reduction not in ("mean", "sum"):
        raise LayoutError(f"grad_reduction must be 'mean' or 'sum', got {grad_reduction!r}")
    groups = groups_of(mesh)
    totals = torch.stack([nll_sum.detach().double(), local_targets.double()])
    for group in groups:
        totals = all_reduce_sum(totals, group)
    divisor = totals[1] if num_targets is None else totals.new_tensor(float(num_targets))
    ranks = 1
    for group in groups if grad_reduction == "mean" else ():
        ranks *= group.size()
    carrier = nll_sum * (ranks / divisor).to(nll_sum.dtype)
    # The value is the mesh's mean, the gradient is this rank's share of it.
    return (totals[0] / divisor).to(nll_sum.dtype) + (carrier - carrier.detach())


def count_targets(batches: Iterable[Batch], *, mesh: DeviceMesh | None = None) -> int:
    """Target tokens of all the micro-batches over the whole mesh: what a step divides by.

    Raises:
        DataError: there is none, so that the step's mean loss does not exist.
    """
    batches = list(batches)
    groups = groups_of(mesh)
    if mesh is None and batches and batches[0].group is not None:
        groups = [batches[0].group]
    device = batches[0].labels.device if batches else torch.device("cpu")
    total = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        total += (batch.labels != IGNORE_INDEX).sum()
    for group in groups:
        total = all_reduce_sum(total, group)
    if not int(total):
        raise DataError("no token of the step is a target: its mean loss does not exist")
    return int(total)


def groups_of(mesh: DeviceMesh | dist.ProcessGroup | None) -> list[dist.ProcessGroup]:
    """Groups that, summed over one after the other, sum over the whole mesh."""
    if mesh is None:
        return []
    groups = [mesh] if isinstance(mesh, dist.ProcessGroup) else mesh.get_all_groups()
    return [group for group in groups if group.size() > 1]


def check_labels(what: str, values: Tensor, labels: Tensor) -> None:
    if values.ndim < 2 or values.shape[:-1].numel() != labels.numel():
        raise LayoutError(
            f"{what} {tuple(values.shape)} and labels {tuple(labels.shape)} hold different "
            "tokens: both must be this rank's shard of one batch"
        )


class _LogitsLoss(torch.autograd.Function):
    """Keeps the logits (no fp32 copy); backward writes one gradient in their dtype."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        total = logits.new_zeros((), dtype=torch.promote_types(logits.dtype, torch.float32))
        for part, wanted in zip(*_blocks(logits, labels), strict=True):
            total += target_loss(part, wanted, ignore_index=IGNORE_INDEX).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for part, wanted, into in zip(*_blocks(logits, labels, gradient), strict=True):
            target_loss(part, wanted, gradient=into, weight=grad_sum, ignore_index=IGNORE_INDEX)
        return gradient, None


def _blocks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows whose fp32 copies may exist at one time: on CUDA none are made."""
    rows = len(logits) if logits.is_cuda else _BLOCK_LOGITS // logits.shape[1]
    return (torch.split(x, max(1, rows)) for x in (logits, *others))
