"""Documents -> one packed stream -> this rank's shard of it, with everything a step needs.

    stream = pack(documents)                  # ids and labels of the whole stream, on every rank
    batch = shard(stream, mesh["sp"])         # this rank's ids, labels, positions, and the layout
    output = model(**batch.inputs)

Labels are shifted in `pack`, before anything is cut, so that no rank needs its neighbour's token
and no document predicts the next one's first token.

Shape letters: N tokens of the stream, T tokens of this rank, D documents.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from seqpar.balance import balanced_layout
from seqpar.comm import agree, all_gather, group_rank, group_size
from seqpar.errors import DataError, LayoutError, MeshError
from seqpar.layout import IGNORE_INDEX, SequenceLayout

__all__ = [
    "Batch",
    "PackedStream",
    "group_of",
    "pack",
    "pack_pairs",
    "shard",
    "unshard",
]

Group: TypeAlias = dist.ProcessGroup | None
LayoutChoice: TypeAlias = Literal["contiguous", "zigzag", "balanced"] | SequenceLayout

_NAMED_LAYOUTS: Mapping[str, Callable[[Sequence[int], int], SequenceLayout]] = {
    "contiguous": SequenceLayout.contiguous,
    "zigzag": SequenceLayout.zigzag,
    "balanced": balanced_layout,
}


@dataclass(frozen=True)
class PackedStream:
    """Documents packed end to end, the same on every rank of a group.

    Attributes:
        ids: int64 [1, N].
        labels: int64 [1, N], aligned with the logits: position t holds the token that the model
            should predict at t, or IGNORE_INDEX.
        cu_seqlens: bounds of the documents, D + 1 integers.
        features: further tensors with one entry per token, [1, N, ...], passed on to the model
            under their names (`token_type_ids`, say).
        source: the encoder's stream, in an encoder-decoder model: document d of this stream is
            generated from its document d.
    """

    ids: Tensor
    labels: Tensor
    cu_seqlens: tuple[int, ...]
    features: Mapping[str, Tensor] = field(default_factory=dict)
    source: PackedStream | None = None

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]


@dataclass(frozen=True)
class Batch:
    """One rank's part of a packed stream.

    Attributes:
        ids, labels: int64 [1, T]; labels are aligned with the logits (already shifted).
        position_ids: int64 [1, T], each token's position within its document.
        layout: where every token of the stream lives; the same value on every rank of the group.
        group: the ranks that the stream is scattered over; None for this rank alone.
        rank: this rank within the group.
        features: further per-token tensors, [1, T, ...].
        source: the encoder's batch, in an encoder-decoder model.
    """

    ids: Tensor
    labels: Tensor
    position_ids: Tensor
    layout: SequenceLayout
    group: Group
    rank: int
    features: Mapping[str, Tensor] = field(default_factory=dict)
    source: Batch | None = None

    @property
    def inputs(self) -> dict[str, Any]:
        """The keyword arguments of a wrapped model's call: `model(**batch.inputs)`.

        The layout and the group travel with the call, never in a global: every micro-batch uses
        its own, in a recomputed forward too.
        """
        if self.source is not None:
            return {
                "input_ids": self.source.ids,
                "decoder_input_ids": self.ids,
                "source_layout": self.source.layout,
                "layout": self.layout,
                "group": self.group,
                **self.features,
            }
        return {
            "input_ids": self.ids,
            "position_ids": self.position_ids,
            "layout": self.layout,
            "group": self.group,
            **self.features,
        }

    @property
    def num_targets(self) -> int:
        """How many of this rank's tokens have a label (waits for the device)."""
        return int((self.labels != IGNORE_INDEX).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on another device."""
        return replace(
            self,
            ids=self.ids.to(device),
            labels=self.labels.to(device),
            position_ids=self.position_ids.to(device),
            features={name: tensor.to(device) for name, tensor in self.features.items()},
            source=None if self.source is None else self.source.to(device),
        )


def pack(
    documents: Sequence[Tensor | Sequence[int]],
    *,
    labels: Sequence[Tensor | Sequence[int]] | None = None,
    shift_labels: bool = True,
    features: Mapping[str, Sequence[Tensor]] | None = None,
) -> PackedStream:
    """Pack documents end to end and make their labels.

    Args:
        documents: token ids of each document, at least one token each.
        labels: per document as many labels as tokens; by default the token ids. IGNORE_INDEX
            marks a token that is no target.
        shift_labels: labels are token-aligned, as data sets hold them: position t of the result
            takes the label of t + 1, and each document's last is ignored. Set False where the
            model predicts the token at its own place (masked language models).
        features: per name, one tensor per document, [tokens, ...].

    Raises:
        DataError: no document, a document without a token, ids that are no integers, or
            labels or features of another length than their document.
    """
    tokens = [_whole_numbers(document) for document in documents]
    lengths = _checked_lengths(tokens)
    cu_seqlens = (0, *itertools.accumulate(lengths))
    ids = torch.cat(tokens)[None]
    if labels is None:
        aligned = ids
    else:
        parts = [_whole_numbers(part) for part in labels]
        _check_parts("labels", parts, lengths)
        aligned = torch.cat(parts)[None].to(ids.device)
    if shift_labels:
        aligned = SequenceLayout.contiguous(cu_seqlens, 1).next_token_labels(aligned)
    packed_features = {}
    for name, tensors in (features or {}).items():
        _check_parts(name, tensors, lengths)
        packed_features[name] = torch.cat(list(tensors))[None]
    return PackedStream(ids, aligned, cu_seqlens, packed_features)


def pack_pairs(
    sources: Sequence[Tensor | Sequence[int]],
    targets: Sequence[Tensor | Sequence[int]],
    *,
    start_token: int = 0,
) -> PackedStream:
    """Pack source and target documents for an encoder-decoder model.

    The decoder reads each target behind a start token and predicts it token by token, so that a
    target of n tokens takes n decoder tokens and has n labels.

    Args:
        sources, targets: as many of each, at least one token each; document d belongs to d.
        start_token: the config's `decoder_start_token_id`.

    Raises:
        DataError: what `pack` refuses, or different numbers of sources and targets.
    """
    if len(sources) != len(targets):
        raise DataError(f"{len(sources)} sources but {len(targets)} targets: give each its own")
    tokens = [_whole_numbers(target) for target in targets]
    _checked_lengths(tokens)
    shifted = [torch.cat([t.new_full((1,), start_token), t[:-1]]) for t in tokens]
    stream = pack(shifted, labels=tokens, shift_labels=False)
    return replace(stream, source=pack(sources))


def shard(
    stream: PackedStream,
    where: DeviceMesh | Group,
    *,
    layout: LayoutChoice = "contiguous",
    source_layout: LayoutChoice = "contiguous",
    device: torch.device | str | None = None,
    check: bool = True,
) -> Batch:
    """This rank's part of a packed stream.

    Args:
        stream: the same value on every rank of the group.
        where: the ranks to scatter over: `mesh["sp"]`, a process group, or None for this rank
            alone.
        layout: "contiguous" (best for state layers), "zigzag" (balances causal softmax layers over
            one document), "balanced" (over many: `balanced_layout`; under a window make it
            yourself, with `window=`), or any SequenceLayout over the same documents and as many
            ranks.
        source_layout: the same for the encoder's stream, which is bidirectional.
        device: where the batch's tensors go; by default they stay where the stream's are.
        check: compare a checksum of the stream and layout over the group (one all_gather of 16
            bytes): ranks that read different documents would train on nonsense without an error.

    Raises:
        LayoutError: a layout over other documents or another number of ranks, or ranks that do
            not hold the same stream; raised on all ranks alike.
        MeshError: a mesh of more than one axis, or a group that this rank is not of.
    """
    group = group_of(where)
    rank = group_rank(group)
    if not isinstance(layout, SequenceLayout):
        layout = _named_layout(layout, stream.cu_seqlens, group_size(group))
    problem = _misfit(stream, layout, group_size(group))
    if check and group is not None:
        agree(
            problem,
            group,
            same=(f"documents {_checksum(stream):08x}", layout.cu_seqlens, layout.spans),
        )
    elif problem is not None:
        raise LayoutError(problem)
    source = None
    if stream.source is not None:
        source = shard(stream.source, group, layout=source_layout, device=device, check=check)
    batch = Batch(
        ids=layout.shard(stream.ids, rank),
        labels=layout.shard(stream.labels, rank),
        position_ids=layout.position_ids(rank)[None].to(stream.ids.device),
        layout=layout,
        group=group,
        rank=rank,
        features={name: layout.shard(x, rank) for name, x in stream.features.items()},
        source=source,
    )
    return batch if device is None else batch.to(device)


def unshard(local: Tensor, batch: Batch, *, dim: int = 1) -> Tensor:
    """The whole stream's tensor on every rank, from each rank's part. No gradient flows.

    Args:
        local: this rank's part, T tokens on `dim` (logits, hidden states, ...).

    Raises:
        LayoutError: a tensor of another number of tokens than the batch.
    """
    layout = batch.layout
    layout.check_tokens(local, dim=dim, expected=layout.tokens_on(batch.rank), what="local tensor")
    front = local.detach().movedim(dim, 0)
    most = max(layout.tokens_on(rank) for rank in range(layout.world_size))
    padded = front.new_zeros(most, *front.shape[1:])
    padded[: len(front)] = front
    shards = [
        part[: layout.tokens_on(rank)]
        for rank, part in enumerate(all_gather(padded, batch.group).unbind(0))
    ]
    return layout.unshard(shards, dim=0).movedim(0, dim)


def group_of(where: DeviceMesh | Group) -> Group:
    """The process group of a one-axis mesh; None for a group of one (it needs no exchange)."""
    if isinstance(where, DeviceMesh):
        if where.ndim != 1:
            raise MeshError(
                f"a stream is scattered over one mesh axis, got axes {where.mesh_dim_names}: "
                'pass mesh["sp"]'
            )
        where = where.get_group()
    if where is None or where.size() == 1:
        return None
    return where


def _misfit(stream: PackedStream, layout: SequenceLayout, world_size: int) -> str | None:
    if layout.world_size == world_size and layout.cu_seqlens == stream.cu_seqlens:
        return None
    return (
        f"the layout has {layout.world_size} ranks and bounds {layout.cu_seqlens[:4]}..., but the "
        f"group has {world_size} and the stream {stream.cu_seqlens[:4]}...: make it from this "
        "stream's cu_seqlens and this group's size"
    )


def _checksum(stream: PackedStream) -> int:
    both = torch.cat([stream.ids, stream.labels]).cpu().contiguous()
    return zlib.crc32(both.numpy().tobytes())


def _named_layout(name: str, cu_seqlens: tuple[int, ...], world_size: int) -> SequenceLayout:
    if name not in _NAMED_LAYOUTS:
        names = ", ".join(map(repr, _NAMED_LAYOUTS))
        raise LayoutError(f"layout must be {names} or a SequenceLayout, got {name!r}")
    return _NAMED_LAYOUTS[name](cu_seqlens, world_size)


def _whole_numbers(values: Tensor | Sequence[int]) -> Tensor:
    """int64; an empty list is one of no numbers, which `_checked_lengths` refuses."""
    tensor = torch.as_tensor(values)
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex()):
        raise DataError(f"token ids and labels are integers, got {tensor.dtype}: tokenize first")
    return tensor.to(torch.int64)


def _checked_lengths(tokens: list[Tensor]) -> list[int]:
    if not tokens:
        raise DataError("no document to pack: a stream needs at least one")
    for index, document in enumerate(tokens):
        if document.ndim != 1 or not len(document):
            raise DataError(
                f"document {index} has shape {tuple(document.shape)}: a document is one row of at "
                "least one token; leave empty ones out"
            )
    return [len(document) for document in tokens]


def _check_parts(what: str, parts: Sequence[Tensor], lengths: list[int]) -> None:
    found = [len(part) for part in parts]
    if found != lengths:
        wrong = next(
            (i for i, (a, b) in enumerate(zip(found, lengths, strict=False)) if a != b), len(found)
        )
        raise DataError(
            f"{what} do not fit the documents: {len(found)} of {len(lengths)} given, and document "
            f"{wrong} differs in length"
        )
