"""The reference side of a parity check: whole documents through an unwrapped model."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.adapters.hf_models import hugging_face_model
from seqpar.batch import Batch, PackedStream, unshard
from seqpar.layout import IGNORE_INDEX, SequenceLayout

__all__ = ["documents_of", "logits_and_labels", "run_document", "whole_stream"]


def whole_stream(batch: Batch) -> PackedStream:
    """Every rank's part of the batch put together again."""
    return PackedStream(
        unshard(batch.ids, batch),
        unshard(batch.labels, batch),
        batch.layout.cu_seqlens,
        {name: unshard(tensor, batch) for name, tensor in batch.features.items()},
        None if batch.source is None else whole_stream(batch.source),
    )


def documents_of(stream: PackedStream) -> list[PackedStream]:
    """Each document as a stream of its own, its source beside it."""
    sources = [None] * (len(stream.cu_seqlens) - 1)
    if stream.source is not None:
        sources = documents_of(stream.source)  # type: ignore[assignment]
    return [
        PackedStream(
            stream.ids[:, start:stop],
            stream.labels[:, start:stop],
            (0, stop - start),
            {name: tensor[:, start:stop] for name, tensor in stream.features.items()},
            source,
        )
        for (start, stop), source in zip(
            itertools.pairwise(stream.cu_seqlens), sources, strict=True
        )
    ]


def run_document(model: nn.Module, document: PackedStream) -> Any:
    """The unwrapped model on one whole document."""
    layout = SequenceLayout.contiguous(document.cu_seqlens, 1)
    positions = layout.position_ids(0)[None].to(document.ids.device)
    if hugging_face_model(model) is None:
        return model(document.ids, positions, layout=layout, group=None, **document.features)
    if document.source is not None:
        return model(input_ids=document.source.ids, decoder_input_ids=document.ids, use_cache=False)
    return model(
        input_ids=document.ids, position_ids=positions, use_cache=False, **document.features
    )


def logits_and_labels(output: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits in whatever a model returns: themselves, `.logits`, or the first of a tuple.

    A model without a head gives hidden states: they stand for logits, and labels that are beyond
    their width for smaller ones.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None:
        logits = output[0]
        labels = torch.where(labels == IGNORE_INDEX, labels, labels % logits.shape[-1])
    return logits, labels
