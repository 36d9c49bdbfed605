"""Batches: what pack, shard and the padding helpers hold, token by token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from seqpar.balance import balanced_layout
from seqpar.batch import (
    pack,
    pack_pairs,
    shard,
    unshard,
)
from seqpar.errors import DataError, LayoutError, MeshError
from seqpar.layout import IGNORE_INDEX, SequenceLayout
from tests.ranks import run_ranks

DOCUMENTS = [[10, 11, 12], [20], [30, 31], [40, 41, 42, 43, 44]]


def test_labels_are_shifted_within_each_document() -> None:
    stream = pack(DOCUMENTS)
    x = IGNORE_INDEX
    assert stream.ids.tolist() == [[10, 11, 12, 20, 30, 31, 40, 41, 42, 43, 44]]
    assert stream.labels.tolist() == [[11, 12, x, x, 31, x, 41, 42, 43, 44, x]]
    assert stream.cu_seqlens == (0, 3, 4, 6, 11)


def test_given_labels_are_shifted_and_masks_kept() -> None:
    x = IGNORE_INDEX
    stream = pack([[1, 2, 3], [4, 5]], labels=[[x, x, 3], [x, 5]])
    assert stream.labels.tolist() == [[x, 3, x, 5, x]]
    aligned = pack([[1, 2, 3], [4, 5]], labels=[[x, 7, x], [8, x]], shift_labels=False)
    assert aligned.labels.tolist() == [[x, 7, x, 8, x]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack([]), "at least one"),
        (lambda: pack([[1], []]), "document 1"),
        (lambda: pack([torch.zeros(2, 2, dtype=torch.int64)]), "document 0"),
        (lambda: pack([torch.rand(3)]), "integers, got torch.float32"),
        (lambda: pack([[1, 2]], labels=[[1, 0.5]]), "integers, got torch.float32"),
        (lambda: pack([[1, 2]], labels=[[1]]), "labels do not fit"),
        (lambda: pack([[1], [2]], labels=[[1]]), "1 of 2 given"),
        (lambda: pack([[1]], features={"kind": [torch.zeros(2)]}), "kind do not fit"),
    ],
)
def test_what_cannot_be_packed_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        call()


def test_a_layout_of_another_stream_is_refused() -> None:
    stream = pack(DOCUMENTS)
    with pytest.raises(LayoutError, match="2 ranks"):
        shard(stream, None, layout=SequenceLayout.contiguous(stream.cu_seqlens, 2))
    with pytest.raises(LayoutError, match="bounds"):
        shard(stream, None, layout=SequenceLayout.contiguous((0, 11), 1))
    with pytest.raises(LayoutError, match="'contiguous', 'zigzag', 'balanced'"):
        shard(stream, None, layout="striped")  # type: ignore[arg-type]


def test_pairs_start_each_target_with_a_token_and_shift_nothing() -> None:
    stream = pack_pairs([[1, 2, 3], [4]], [[5, 6], [7, 8, 9]], start_token=0)
    assert stream.ids.tolist() == [[0, 5, 0, 7, 8]]
    assert stream.labels.tolist() == [[5, 6, 7, 8, 9]]
    assert stream.source is not None
    assert stream.source.ids.tolist() == [[1, 2, 3, 4]]
    batch = shard(stream, None)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3, 4]]
    assert batch.inputs["decoder_input_ids"].tolist() == [[0, 5, 0, 7, 8]]
    assert batch.inputs["source_layout"].cu_seqlens == (0, 3, 4)
    with pytest.raises(DataError, match="1 sources but 2 targets"):
        pack_pairs([[1]], [[1], [2]])


def _shards_on_a_mesh(rank: int) -> list[dict[str, object]]:
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    kinds = [torch.full((len(document), 2), i) for i, document in enumerate(DOCUMENTS)]
    stream = pack(DOCUMENTS, features={"kind": kinds})
    found = []
    for layout in ("contiguous", "zigzag", "balanced"):
        batch = shard(stream, mesh["sp"], layout=layout)  # type: ignore[arg-type]
        assert batch.inputs["input_ids"] is batch.ids
        assert batch.inputs["layout"] is batch.layout
        assert batch.inputs["group"] is mesh["sp"].get_group()
        assert batch.num_targets == int((batch.labels != IGNORE_INDEX).sum())
        found.append(
            {
                "rank": batch.rank,
                "ids": batch.ids,
                "labels": batch.labels,
                "positions": batch.position_ids,
                "kind": batch.features["kind"],
                "whole": unshard(batch.features["kind"].transpose(1, 2), batch, dim=-1),
            }
        )
    other = pack([[rank], [1]])  # each rank read other documents
    with pytest.raises(LayoutError, match="not given the same input"):
        shard(other, mesh["sp"])
    bad = SequenceLayout.contiguous(stream.cu_seqlens, 4 if rank else 3)
    with pytest.raises(LayoutError, match="the layout has 3 ranks"):
        shard(stream, dist.group.WORLD, layout=bad)
    with pytest.raises(MeshError, match='mesh\\["sp"\\]'):
        shard(stream, mesh)
    return found


def test_shards_of_a_mesh_give_the_stream_back() -> None:
    stream = pack(DOCUMENTS)
    positions = torch.tensor([[0, 1, 2, 0, 0, 1, 0, 1, 2, 3, 4]])
    kind = torch.tensor([[0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 3]])[..., None].expand(1, 11, 2)
    results = run_ranks(4, _shards_on_a_mesh)
    makers = (SequenceLayout.contiguous, SequenceLayout.zigzag, balanced_layout)
    for index, make in enumerate(makers):
        layout = make(stream.cu_seqlens, 2)
        for dp in (0, 2):
            parts = [results[dp + sp][index] for sp in (0, 1)]
            assert [part["rank"] for part in parts] == [0, 1]
            for name, whole in (
                ("ids", stream.ids),
                ("labels", stream.labels),
                ("positions", positions),
                ("kind", kind),
            ):
                assert torch.equal(layout.unshard([part[name] for part in parts]), whole), name
            assert all(torch.equal(part["whole"], kind.transpose(1, 2)) for part in parts)
