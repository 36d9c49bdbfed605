"""What a DataLoader yields -> one packed stream, or a refusal to guess where its documents end.

Shape letters: R rows, L row length, N tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.batch import PackedStream, pack
from seqpar.errors import DataError

__all__ = ["collate_documents", "documents_of_padded", "documents_of_positions", "stream_of"]

_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k")
_UNDERSTOOD = {
    *("input_ids", "labels", "attention_mask", "position_ids", "seq_idx"),
    *(*_BOUNDS, "max_length_q", "max_length_k"),
}


def documents_of_padded(input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
    """Rows with padding -> one document per row, its masked tokens dropped.

    Args:
        input_ids: [R, L], or labels or any other per-token tensor [R, L, ...].
        attention_mask: [R, L], non-zero where a token counts; padding may be on either side.

    Raises:
        DataError: shapes that differ, a row without a token, or a mask with a hole: tokens on
            both sides of a masked one would become neighbours.
    """
    if attention_mask.shape != input_ids.shape[:2]:
        raise DataError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the ids "
            f"{tuple(input_ids.shape)}: both need the same rows and length"
        )
    kept = attention_mask != 0
    for row, mask in enumerate(kept):
        held = mask.nonzero()
        if not len(held):
            raise DataError(f"row {row} is all padding: leave it out")
        if int(held[-1] - held[0]) + 1 != len(held):
            raise DataError(f"row {row} masks tokens inside its document: split the row there")
    return [ids[mask] for ids, mask in zip(input_ids, kept, strict=True)]


def documents_of_positions(input_ids: Tensor, position_ids: Tensor) -> list[Tensor]:
    """Rows packed by position ids that restart at 0 -> one document per restart.

    Both [R, L] (the ids may have further dims). A new row always starts a new document.

    Raises:
        DataError: shapes that differ, or positions that neither go on by one nor restart at 0.
    """
    if position_ids.shape != input_ids.shape[:2]:
        raise DataError(f"position_ids {tuple(position_ids.shape)} and {tuple(input_ids.shape)=}")
    documents: list[Tensor] = []
    for ids, positions in zip(input_ids, position_ids, strict=True):
        starts = positions == 0
        steps = starts[1:] | (positions[1:] == positions[:-1] + 1)
        if not (bool(starts[0]) and bool(steps.all())):
            raise DataError("position_ids must start at 0 and go on by one or restart at 0")
        bounds = [*starts.nonzero().flatten().tolist(), len(positions)]
        documents += [ids[a:b] for a, b in itertools.pairwise(bounds)]
    return documents


def collate_documents(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """A collator that pads nothing: each column as a list of tensors, one for each document.

    For `transformers.Trainer(data_collator=...)` or `DataLoader(collate_fn=...)`; the loaders of
    `seqpar.loaders` pack what it returns. Columns other than `input_ids` and `labels` are left out.

    Raises:
        DataError: an example without `input_ids`.
    """
    for index, example in enumerate(examples):
        if "input_ids" not in example:
            raise DataError(f"example {index} has no input_ids, only {sorted(example)}")
    return {
        name: [torch.as_tensor(example[name]) for example in examples]
        for name in ("input_ids", "labels")
        if name in examples[0]
    }


def stream_of(rows: Any, *, shift_labels: bool = True) -> PackedStream:
    """What a DataLoader yields -> one packed stream.

    Args:
        rows: token ids of several documents; or a mapping with `input_ids` and optionally `labels`,
            either lists of documents, or [R, L] tensors. Padding by `attention_mask` becomes
            nothing. Documents of a row are told apart by `position_ids` that restart at 0, by
            `seq_idx`, or by `cu_seq_lens_q` (one row), as transformers' collators write them; if
            several are there they must agree. Without any, each row is a document.
        shift_labels: as `pack` takes it.

    Raises:
        DataError: rows of none of these kinds, or with columns whose meaning would be lost.
    """
    if not isinstance(rows, Mapping):
        return pack(list(rows), shift_labels=shift_labels)
    _check_columns(rows)
    ids, labels = rows["input_ids"], rows.get("labels")
    if isinstance(ids, Tensor) and ids.ndim == 2:
        starts = _starts(rows)
        ids = _cut(_unpadded(ids, rows), starts)
        labels = None if labels is None else _cut(_unpadded(labels, rows), starts)
    return pack(ids, labels=labels, shift_labels=shift_labels)


def _check_columns(rows: Mapping[str, Any]) -> None:
    present = {name for name in rows if rows[name] is not None}
    if "input_ids" not in present:
        raise DataError(f"a batch needs input_ids, got {sorted(rows)}")
    ids = rows["input_ids"]
    is_table = isinstance(ids, Tensor) and ids.ndim == 2
    unknown = sorted(present - (_UNDERSTOOD if is_table else {"input_ids", "labels"}))
    if unknown:
        kind = "" if is_table else " beside a list of documents"
        raise DataError(
            f"columns {unknown} are not understood{kind}: what they mean to the model would be "
            "lost; leave them out of the batches if it needs none of them"
        )


def _unpadded(column: Tensor, rows: Mapping[str, Any]) -> list[Tensor]:
    mask = rows.get("attention_mask")
    return list(column) if mask is None else documents_of_padded(column, mask)


def _starts(rows: Mapping[str, Any]) -> list[list[int]]:
    """Where documents start in each row, as every column says that knows."""
    kept = _unpadded(rows["input_ids"], rows)
    said: dict[str, list[list[int]]] = {}
    if (positions := rows.get("position_ids")) is not None:
        said["position_ids"] = [
            _running([len(part) for part in documents_of_positions(ids[None], row[None])])
            for ids, row in zip(kept, _unpadded(positions, rows), strict=True)
        ]
    if (numbers := rows.get("seq_idx")) is not None:
        said["seq_idx"] = [
            [0, *(1 + torch.nonzero(row.diff())).flatten().tolist()]
            for row in _unpadded(numbers, rows)
        ]
    for name in _BOUNDS:
        if (bounds := rows.get(name)) is not None:
            said[name] = [_bounds(name, bounds, kept)]
    if not said:
        return [[0] for _ in kept]
    first, *others = said
    for other in others:
        if said[other] != said[first]:
            raise DataError(
                f"{first} and {other} put the documents' starts at {said[first]} and "
                f"{said[other]}: leave out the one that is wrong"
            )
    return said[first]


def _bounds(name: str, bounds: Tensor, kept: list[Tensor]) -> list[int]:
    found = [int(bound) for bound in bounds.flatten()]
    if len(kept) != 1 or found[:1] != [0] or found[-1] != len(kept[0]) or found != sorted(found):
        raise DataError(
            f"{name} must go from 0 to the tokens of one row without padding, got {found} for "
            f"rows of {[len(row) for row in kept]} tokens"
        )
    return found[:-1]


def _running(lengths: list[int]) -> list[int]:
    return [sum(lengths[:index]) for index in range(len(lengths))]


def _cut(rows: list[Tensor], starts: list[list[int]]) -> list[Tensor]:
    return [part for row, at in zip(rows, starts, strict=True) for part in row.tensor_split(at[1:])]
