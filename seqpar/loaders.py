"""From any DataLoader to sequence-parallel batches.

Data loaders give every rank other rows. A stream needs one set of rows on all ranks of its group,
so the ranks take turns: each one's rows are sent to the others, packed, and sharded, and all of
them work on these together. Nothing that a rank has read is dropped.

    for batch in SequenceParallelLoader(loader, mesh["sp"]):
        logits = model(**batch.inputs).logits
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from seqpar.batch import Batch, Group, LayoutChoice, PackedStream, group_of, pack, shard
from seqpar.comm import all_gather_objects, broadcast_object, group_rank, group_size
from seqpar.layout import IGNORE_INDEX
from seqpar.loss import groups_of
from seqpar.rows import collate_documents, stream_of

__all__ = ["SequenceParallelLoader", "TrainerLoader", "collate_documents", "stream_of"]

_END = "end of data"


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
        mesh: the whole mesh, if its groups may read different numbers of batches. One that has no
            rows left goes on with a token that is no target until none has any: DDP, fully_shard
            and `token_loss` wait for every rank. One small gather a batch.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        where: DeviceMesh | Group,
        *,
        layout: LayoutChoice = "contiguous",
        shift_labels: bool = True,
        device: torch.device | str | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.loader = loader
        self.group = group_of(where)
        self.layout: LayoutChoice = layout
        self.shift_labels = shift_labels
        self.device = device
        self.everywhere = groups_of(mesh)

    def __len__(self) -> int:
        """Batches in one pass, if every rank reads as many as this one."""
        return len(self.loader) * group_size(self.group)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Batch]:
        streams, no_target = self._streams(), pack([[0]], labels=[[IGNORE_INDEX]])
        while True:
            stream = next(streams, None)
            if not self._anywhere(stream is not None):
                return
            # All ranks have just been sent these rows: there is nothing to compare.
            yield shard(
                no_target if stream is None else stream,
                self.group,
                layout="contiguous" if stream is None else self.layout,
                device=self.device,
                check=False,
            )

    def _streams(self) -> Iterator[PackedStream]:
        """Every rank's rows, in turn."""
        mine = iter(self.loader)
        sources = list(range(group_size(self.group)))
        while sources:
            own = next(mine, _END) if group_rank(self.group) in sources else _END
            for source in tuple(sources):
                rows = broadcast_object(own, self.group, source=source)
                if isinstance(rows, str) and rows == _END:
                    sources.remove(source)
                else:
                    yield stream_of(rows, shift_labels=self.shift_labels)

    def _anywhere(self, here: bool) -> bool:
        """Whether it is so on any rank of the mesh."""
        for group in self.everywhere:
            here = any(all_gather_objects(here, group))
        return here


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
