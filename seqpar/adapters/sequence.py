"""What a wrapped call carries down to its attention layers: the layout, the ranks, the strategy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from seqpar.comm import group_rank
from seqpar.errors import UnsupportedModelError
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_choice import Strategy

__all__ = [
    "SequenceContext",
    "autocast_together",
    "held_tokens",
    "outside_graph",
    "refilled",
    "refuse_unknown",
]

F = TypeVar("F", bound=Callable[..., object])

# Keyword arguments that transformers hands to every token-mixing layer and that change no result
# here: positions are in q and k already, caches and masks are refused at the model's door.
_HARMLESS = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "cu_seq_lens_q",
        "deterministic",
        "encoder_hidden_states",
        "is_causal",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "past_key_values",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "shift_labels",
        "use_cache",
    }
)


@dataclass(frozen=True)
class SequenceContext:
    """One forward pass's place: an argument from the model's call to its attention layers.

    It is a value and it travels as a keyword argument, so a recomputed layer (activation
    checkpointing saves a layer's arguments) sees what its first forward saw, and two forwards
    before two backwards cannot mix their layouts.

    Attributes:
        layout: where every token of the stream lives.
        group: the ranks it is scattered over; None for this rank alone.
        strategy: how softmax layers exchange (see `softmax_attention`).
        exchange: how state layers exchange (see `state_attention`).
        source_layout: the encoder's stream in an encoder-decoder model.
    """

    layout: SequenceLayout
    group: ProcessGroup | None
    strategy: Strategy = "auto"
    exchange: str = "auto"
    source_layout: SequenceLayout | None = None

    @property
    def rank(self) -> int:
        return group_rank(self.group)

    @property
    def num_tokens(self) -> int:
        """Tokens of the layout on this rank."""
        return self.layout.tokens_on(self.rank)


def outside_graph(function: F) -> F:
    """Keep a function out of torch.compile's graphs: it communicates, or reads layouts."""
    return cast(F, torch.compiler.disable(function))  # type: ignore[no-untyped-call]


def held_tokens(
    x: Tensor, sequence: SequenceContext, layout: SequenceLayout | None = None
) -> Tensor:
    """[B, T, ...] without the token that stands in on a rank that holds none.

    `layout` is the stream's that x belongs to, if it is not the context's own.
    """
    return x[:, : (layout or sequence.layout).tokens_on(sequence.rank)]


def refilled(x: Tensor, num_tokens: int) -> Tensor:
    """The inverse of `held_tokens`: zeros for that token."""
    missing = num_tokens - x.shape[1]
    return torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], 1) if missing else x


def refuse_unknown(module: nn.Module, others: dict[str, Any]) -> None:
    """Refuse keyword arguments that a layer was handed and that may change its result.

    Raises:
        UnsupportedModelError: one that is set and is not known to be harmless.
    """
    for argument, value in others.items():
        if value is not None and argument not in _HARMLESS:
            raise UnsupportedModelError(
                type(module).__name__,
                f"it takes {argument!r}, which seqpar's operators do not",
                "use a configuration without it, or another model",
            )


def autocast_together(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In autocast's dtype where it is on, as torch's own attention would get them."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(tensor.to(dtype) for tensor in tensors)
