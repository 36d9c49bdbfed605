"""What DataLoaders yield becomes one stream, or is refused: never documents that run together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from seqpar.errors import DataError
from seqpar.rows import (
    collate_documents,
    documents_of_padded,
    documents_of_positions,
    stream_of,
)

PADDED = torch.tensor([[0, 5, 6, 7], [8, 9, 0, 0]])
FLAT = torch.tensor([[5, 6, 7, 8, 9]])
RESTARTING = torch.tensor([[0, 1, 2, 0, 1]])


@pytest.mark.parametrize(
    "rows",
    [
        [[5, 6, 7], [8, 9]],
        collate_documents([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9], "length": 2}]),
        {"input_ids": PADDED, "attention_mask": PADDED > 0, "labels": PADDED},
        {"input_ids": FLAT, "position_ids": RESTARTING},
        {"input_ids": FLAT, "cu_seq_lens_q": torch.tensor([0, 3, 5]), "max_length_q": 3},
        {"input_ids": FLAT, "seq_idx": torch.tensor([[0, 0, 0, 1, 1]]), "attention_mask": None},
        {  # packed and padded: the mask takes the padding, the positions part the documents
            "input_ids": torch.tensor([[5, 6, 7, 8, 9, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]]),
            "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 0]]),
        },
    ],
    ids=["lists", "collated", "padded", "positions", "bounds", "numbers", "packed and padded"],
)
def test_rows_of_every_kind_become_the_same_stream(rows: Any) -> None:
    stream = stream_of(rows)
    assert stream.cu_seqlens == (0, 3, 5)
    assert stream.ids.tolist() == [[5, 6, 7, 8, 9]]
    assert stream.labels.tolist() == [[6, 7, -100, 9, -100]]


@pytest.mark.parametrize("bounds", [False, True])
def test_transformers_own_packing_collator_is_understood(bounds: bool) -> None:
    transformers = pytest.importorskip("transformers")
    collate = transformers.DataCollatorWithFlattening(
        return_position_ids=not bounds, return_flash_attn_kwargs=bounds, return_seq_idx=True
    )
    stream = stream_of(collate([{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]))
    assert stream.cu_seqlens == (0, 3, 5)
    assert stream.labels.tolist() == [[6, 7, -100, 9, -100]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": ["a"]}, "needs input_ids"),
        ({"input_ids": FLAT, "token_type_ids": FLAT}, "'token_type_ids'.* are not understood"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1, 1]]}, "beside a list of documents"),
        (
            {"input_ids": FLAT, "position_ids": RESTARTING, "seq_idx": 0 * FLAT},
            r"position_ids and seq_idx put .* \[\[0, 3\]\] and \[\[0\]\]",
        ),
        ({"input_ids": FLAT, "position_ids": RESTARTING + 2}, "must start at 0"),
        ({"input_ids": FLAT, "cu_seq_lens_q": torch.tensor([0, 3])}, "from 0 to the tokens"),
        ({"input_ids": PADDED, "cu_seq_lens_q": torch.tensor([0, 4, 8])}, "of one row"),
    ],
)
def test_rows_whose_meaning_would_be_lost_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        stream_of(rows)


def test_an_example_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="example 0 has no input_ids"):
        collate_documents([{"text": "a"}])


def test_padding_becomes_documents() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])
    assert [d.tolist() for d in documents_of_padded(ids, mask)] == [[5, 6], [7, 8, 9]]
    with pytest.raises(DataError, match="row 1 masks tokens inside"):
        documents_of_padded(ids, torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]]))
    with pytest.raises(DataError, match="row 0 is all padding"):
        documents_of_padded(ids, torch.zeros(2, 4))


def test_restarting_positions_become_documents() -> None:
    ids = torch.arange(10).view(2, 5)
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    documents = [d.tolist() for d in documents_of_positions(ids, positions)]
    assert documents == [[0, 1, 2], [3, 4], [5], [6, 7, 8, 9]]
    with pytest.raises(DataError, match="restart"):
        documents_of_positions(ids, positions + 1)


def test_fractions_are_no_token_ids() -> None:
    with pytest.raises(DataError, match="tokenize first"):
        stream_of(collate_documents([{"input_ids": [5.0, 6.5]}]))
