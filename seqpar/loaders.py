"""From any DataLoader to sequence-parallel batches.

Data loaders give every rank other rows. A stream needs one set of rows on all ranks of its group,
so the ranks take turns: each one's rows are sent to the others, packed, and sharded, and all of
them work on these together. Nothing that a rank has read is dropped.

    for batch in SequenceParallelLoader(loader, mesh["sp"]):
        logits = model(**batch.inputs).logits
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from seqpar.batch import (
    Batch,
    Group,
    LayoutChoice,
    PackedStream,
    documents_of_padded,
    documents_of_positions,
    group_of,
    pack,
    shard,
)
from seqpar.comm import broadcast_object, group_rank, group_size
from seqpar.errors import DataError

__all__ = ["SequenceParallelLoader", "TrainerLoader", "collate_documents", "stream_of"]

_END = "end of data"


def collate_documents(examples: Sequence[Mapping[str, Any]]) -> dict[str, list[Tensor]]:
    """A collator that pads nothing: each column as a list of tensors, one for each document.

    For `transformers.Trainer(data_collator=...)` or `DataLoader(collate_fn=...)`; the loader below
    packs what it returns. Columns other than `input_ids` and `labels` are left out.

    Raises:
        DataError: an example without `input_ids`.
    """
    for index, example in enumerate(examples):
        if "input_ids" not in example:
            raise DataError(f"example {index} has no input_ids, only {sorted(example)}")
    return {
        name: [torch.as_tensor(example[name], dtype=torch.int64) for example in examples]
        for name in ("input_ids", "labels")
        if name in examples[0]
    }


def stream_of(rows: Any, *, shift_labels: bool = True) -> PackedStream:
    """What a DataLoader yields -> one packed stream.

    Args:
        rows: token ids of several documents; or a mapping with `input_ids` and optionally `labels`,
            either lists of documents, or [R, L] tensors with an `attention_mask` (padding becomes
            nothing, each row a document) or with `position_ids` that restart at 0.
        shift_labels: as `pack` takes it.

    Raises:
        DataError: rows of none of these kinds.
    """
    if not isinstance(rows, Mapping):
        return pack(list(rows), shift_labels=shift_labels)
    if "input_ids" not in rows:
        raise DataError(f"a batch needs input_ids, got {sorted(rows)}")
    columns = [rows["input_ids"], rows.get("labels")]
    if isinstance(columns[0], Tensor) and columns[0].ndim == 2:
        columns = [column if column is None else _documents(column, rows) for column in columns]
    documents, labels = columns
    return pack(documents, labels=labels, shift_labels=shift_labels)


def _documents(column: Tensor, rows: Mapping[str, Any]) -> list[Tensor]:
    if rows.get("attention_mask") is not None:
        return documents_of_padded(column, rows["attention_mask"])
    if rows.get("position_ids") is not None:
        return documents_of_positions(column, rows["position_ids"])
    return list(column)


class SequenceParallelLoader:
    """Iterate over the batches of every rank of a group, each sharded over the group.

    Args:
        loader: any iterable that `stream_of` understands the items of. Ranks of the group should
            read different rows (a DistributedSampler over all ranks); they may read different
            numbers of batches.
        where: `mesh["sp"]`, a group, or None.
        layout: "contiguous", "zigzag", "balanced", or a SequenceLayout.
        shift_labels: as `pack` takes it.
        device: where the batches' tensors go.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        where: DeviceMesh | Group,
        *,
        layout: LayoutChoice = "contiguous",
        shift_labels: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        self.loader = loader
        self.group = group_of(where)
        self.layout: LayoutChoice = layout
        self.shift_labels = shift_labels
        self.device = device

    def __len__(self) -> int:
        """Batches in one pass, if every rank reads as many as this one."""
        return len(self.loader) * group_size(self.group)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        mine = iter(self.loader)
        sources = list(range(group_size(self.group)))
        while sources:
            own = next(mine, _END) if group_rank(self.group) in sources else _END
            for source in tuple(sources):
                rows = broadcast_object(own, self.group, source=source)
                if isinstance(rows, str) and rows == _END:
                    sources.remove(source)
                else:
                    yield self.sharded(rows)

    def sharded(self, rows: Any) -> Batch:
        """One item of the loader as this rank's batch."""
        stream = stream_of(rows, shift_labels=self.shift_labels)
        # All ranks have just been sent these rows: there is nothing to compare.
        return shard(stream, self.group, layout=self.layout, device=self.device, check=False)


class TrainerLoader(SequenceParallelLoader):
    """The same for transformers' Trainer: yields the dictionaries that it passes on.

    Return it from `get_train_dataloader`. The labels are there twice: the Trainer counts targets
    in `shift_labels` and hands `labels` to its `compute_loss_func`.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in super().__iter__():
            yield {**batch.inputs, "labels": batch.labels, "shift_labels": batch.labels}

    @property
    def dataset(self) -> Any:
        """The inner loader's data set, whose length the Trainer reports."""
        return self.loader.dataset  # type: ignore[attr-defined]

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the inner loader, whose sampler shuffles by it."""
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)
