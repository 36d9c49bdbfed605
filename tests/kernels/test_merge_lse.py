"""Partial softmax results merged in any order give the softmax over all keys."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from seqpar.errors import KernelInputError
from seqpar.kernels.merge_lse import merge_lse
from tests.tolerances import relative_error

merge_lse_triton = pytest.importorskip("seqpar.kernels.merge_lse_triton").merge_lse_triton


def softmax_part(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = torch.einsum("bthk,bshk->bths", q, k)
    lse = scores.logsumexp(-1)
    return torch.einsum("bths,bshv->bthv", (scores - lse[..., None]).exp(), v), lse


Merge = Callable[..., tuple[Tensor, Tensor]]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("merge", [merge_lse, merge_lse_triton])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_parts_merge_to_the_whole(scale: float, merge: Merge) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, n, 3, 16, generator=generator, dtype=torch.float64) for n in (9, 40, 40)
    )
    ref_out, ref_lse = softmax_part(q * scale, k, v)
    out = torch.zeros(2, 9, 3, 16)
    lse = torch.full((2, 9, 3), -torch.inf)
    for part in (slice(0, 7), slice(7, 30), slice(30, 40)):
        part_out, part_lse = softmax_part(q * scale, k[:, part], v[:, part])
        parts = (x.float().to(DEVICE) for x in (out, lse, part_out, part_lse))
        out, lse = merge(*parts)
    assert relative_error(out, ref_out) < 3e-6
    assert relative_error(lse, ref_lse) < 1e-6


@pytest.mark.parametrize("merge", [merge_lse, merge_lse_triton])
def test_rows_that_saw_no_key_add_nothing(merge: Merge) -> None:
    out, lse = torch.ones(1, 2, 1, 4), torch.tensor([[[0.5], [-torch.inf]]])
    out[:, 1] = 0.0
    empty, empty_lse = torch.zeros(1, 2, 1, 4), torch.full((1, 2, 1), -torch.inf)
    kept = out.clone()
    merged, merged_lse = merge(*(x.to(DEVICE) for x in (out, lse, empty, empty_lse)))
    assert torch.equal(merged.cpu(), kept)
    assert torch.equal(merged_lse.cpu(), lse)
    assert torch.equal(out, kept)


def test_bad_input_is_refused() -> None:
    out, lse = torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1)
    with pytest.raises(KernelInputError, match="float32"):
        merge_lse(out.bfloat16(), lse, out, lse)
    with pytest.raises(KernelInputError, match="needs"):
        merge_lse(out, lse, out, lse[:, :1])
    with pytest.raises(KernelInputError, match="new_out in a floating dtype"):
        merge_lse(out, lse, out.int(), lse)


@pytest.mark.parametrize("merge", [merge_lse, merge_lse_triton])
def test_what_a_row_that_saw_no_key_holds_does_not_matter(merge: Merge) -> None:
    out, new_out = torch.ones(1, 3, 1, 4), 2 * torch.ones(1, 3, 1, 4)
    lse = torch.tensor([[[0.5], [-torch.inf], [-torch.inf]]])
    new_lse = torch.tensor([[[-torch.inf], [0.25], [-torch.inf]]])
    out[lse == -torch.inf] = torch.nan
    new_out[new_lse == -torch.inf] = torch.inf
    merged, merged_lse = merge(*(x.to(DEVICE) for x in (out, lse, new_out, new_lse)))
    assert merged[0, :, 0].tolist() == [[1.0] * 4, [2.0] * 4, [0.0] * 4]
    assert merged_lse.flatten().tolist() == [0.5, 0.25, -torch.inf]


@pytest.mark.parametrize("merge", [merge_lse, merge_lse_triton])
def test_a_nan_stays_one(merge: Merge) -> None:
    out, lse = torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 1)
    broken = torch.tensor([[[torch.nan], [0.0]]])
    for given in ((out, broken, out, lse), (out, lse, out, broken)):
        merged, merged_lse = merge(*(x.to(DEVICE) for x in given))
        assert merged_lse.isnan().flatten().tolist() == [True, False]
        assert merged.isnan().flatten(2)[0].all(1).tolist() == [True, False]
