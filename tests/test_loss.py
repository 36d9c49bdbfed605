"""Losses against torch's own cross-entropy in one process, for every dp x sp split."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from seqpar import loss as loss_module
from seqpar.batch import PackedStream, pack, shard
from seqpar.errors import DataError, LayoutError
from seqpar.head_loss import lm_head_loss_sum
from seqpar.layout import IGNORE_INDEX, SequenceLayout
from seqpar.loss import (
    count_targets,
    mean_over_mesh,
    token_loss,
    token_loss_sum,
)
from tests.loss_cases import HIDDEN, VOCAB, loss_inputs, reference_sum
from tests.ranks import run_ranks
from tests.tolerances import MODEL_GRADIENT, MODEL_LOSS, RELATIVE, relative_error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("num_tokens", [0, 1, 23])
def test_sum_over_blocks_equals_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, num_tokens: int
) -> None:
    monkeypatch.setattr(loss_module, "_BLOCK_LOGITS", 4 * VOCAB)  # blocks of four tokens
    hidden, weight, bias, labels = loss_inputs(num_tokens, dtype)
    logits = (hidden @ weight.T + bias).requires_grad_()
    nll, count = token_loss_sum(logits, labels)
    (3 * nll).backward()
    reference = logits.detach().double().requires_grad_()
    expected = reference_sum(reference, labels)
    (3 * expected).backward()
    assert count.item() == (labels != IGNORE_INDEX).sum()
    assert nll.dtype == torch.promote_types(dtype, torch.float32)
    assert relative_error(nll, expected) < 1e-6
    assert relative_error(logits.grad, reference.grad) <= RELATIVE[dtype]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(LayoutError, match="different tokens"):
        token_loss_sum(torch.zeros(1, 4, 3), torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(LayoutError, match="different tokens"):
        lm_head_loss_sum(torch.zeros(1, 4, 3), torch.zeros(9, 3), torch.zeros(1, 5).long())
    with pytest.raises(LayoutError, match="grad_reduction"):
        mean_over_mesh(torch.zeros(()), torch.ones(()), mesh=None, grad_reduction="avg")  # type: ignore[arg-type]


# -- over a mesh ----------------------------------------------------------------------------------

STEP = [[[3, 1, 4, 1, 5, 9, 2], [6]], [[5, 3, 5, 8, 9, 7, 9, 3, 2, 3, 8, 4]], [[2]], [[6, 4, 3, 3]]]
"""Four packed streams: of 8, 12, 1 and 4 tokens, so that no two ranks hold equally many targets."""


def _weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(VOCAB, HIDDEN, generator=generator)
    return embedding.requires_grad_(), torch.randn(VOCAB, HIDDEN, generator=generator)


def _one_device() -> tuple[float, Tensor]:
    embedding, head = _weights()
    streams = [pack(documents) for documents in STEP]
    ids = torch.cat([stream.ids for stream in streams], 1)
    labels = torch.cat([stream.labels for stream in streams], 1)
    loss = functional.cross_entropy((embedding[ids] @ head.T)[0], labels[0])
    loss.backward()
    return loss.item(), embedding.grad


def _streams_of(dp_rank: int, dp: int) -> list[PackedStream]:
    return [pack(documents) for documents in STEP[dp_rank::dp]]


def _split_loss(dp: int, grad_reduction: str, fused: bool) -> tuple[float, Tensor]:
    sp = dist.get_world_size() // dp
    mesh = dist.device_mesh.init_device_mesh("cpu", (dp, sp), mesh_dim_names=("dp", "sp"))
    embedding, head = _weights()
    layouts = ("contiguous", "zigzag")
    batches = [
        shard(stream, mesh["sp"], layout=layouts[i % 2])  # type: ignore[arg-type]
        for i, stream in enumerate(_streams_of(mesh.get_local_rank("dp"), dp))
    ]
    targets = count_targets(batches, mesh=mesh)
    total = 0.0
    for batch in batches:  # gradient accumulation over micro-batches of different layouts
        options = {"mesh": mesh, "num_targets": targets, "grad_reduction": grad_reduction}
        if fused:
            sums = lm_head_loss_sum(embedding[batch.ids], head, batch.labels, block_tokens=3)
            loss = mean_over_mesh(*sums, **options)  # type: ignore[arg-type]
        else:
            loss = token_loss(embedding[batch.ids] @ head.T, batch, **options)  # type: ignore[arg-type]
        loss.backward()
        total += loss.item()
    dist.all_reduce(embedding.grad)
    if grad_reduction == "mean":
        embedding.grad /= dp * sp
    return total, embedding.grad


SPLITS = list(itertools.product((1, 2, 4), ("mean", "sum"), (False, True)))
"""Ranks of the data-parallel axis of four, the gradients' reduction, whether the head is fused."""


def _all_splits(rank: int) -> list[tuple[float, Tensor]]:
    return [_split_loss(*split) for split in SPLITS]


def test_every_split_gives_the_one_device_mean() -> None:
    expected_loss, expected_grad = _one_device()
    for results in run_ranks(4, _all_splits):
        for split, (loss, grad) in zip(SPLITS, results, strict=True):
            assert abs(loss / expected_loss - 1) < MODEL_LOSS, split
            assert relative_error(grad, expected_grad) < MODEL_GRADIENT, split


def _own_mean(rank: int) -> float:
    batch = shard(pack(STEP[1]), dist.group.WORLD)
    embedding, head = _weights()
    return token_loss(embedding[batch.ids] @ head.T, batch).item()


def test_without_a_mesh_the_mean_is_over_the_batch_group() -> None:
    embedding, head = _weights()
    stream = pack(STEP[1])
    expected = functional.cross_entropy((embedding[stream.ids] @ head.T)[0], stream.labels[0])
    for loss in run_ranks(3, _own_mean):
        assert abs(loss / expected.item() - 1) < MODEL_LOSS


def test_a_step_without_targets_is_refused() -> None:
    stream = pack([[1], [2]])
    batch = shard(stream, None, layout=SequenceLayout.contiguous(stream.cu_seqlens, 1))
    with pytest.raises(DataError, match="no token"):
        count_targets([batch])
    assert token_loss(torch.zeros(1, 2, 5), batch).isnan()
