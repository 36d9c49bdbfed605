"""Softmax attention of Hugging Face models, through transformers' attention interface.

transformers calls one function for every attention layer, chosen by name, with the layer's own
keyword arguments and whatever keyword arguments the model's call was given. That is how the
layout arrives here. `install` registers the function under ATTENTION_NAME, and a mask function
beside it: documents, causality and windows are the layout's business, so no mask is ever built,
and a mask that asks for more is refused rather than dropped.

Shape letters: B batch (1), H query heads, G key/value heads, T tokens of this rank, D head dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seqpar.adapters.sequence import (
    SequenceContext,
    autocast_together,
    held_tokens,
    outside_graph,
    refilled,
    refuse_unknown,
)
from seqpar.errors import LayoutError, UnsupportedModelError
from seqpar.ops.softmax import softmax_attention

__all__ = ["ATTENTION_NAME", "hf_attention", "install"]

ATTENTION_NAME = "seqpar"


def hf_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sequence: SequenceContext | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in place of its own attention.

    Args:
        query: [B, H, T, D]; key and value [B, G, T, D], this rank's tokens, positions applied.
        attention_mask: None; the layout says what is masked.
        sequence: what the wrapped model's call was given.
        scaling: factor of the scores; D**-0.5 by default.
        dropout: probability on the attention weights; must be 0.
        sliding_window: as in the config, the query itself counted.

    Returns:
        [B, T, H, D] in the query's dtype, and None for the attention weights.

    Raises:
        LayoutError: called without a layout.
        UnsupportedModelError: an argument that would change the result.
    """
    if sequence is None:
        raise LayoutError(
            "this model was wrapped by seqpar.parallelize and needs the layout of its batch: call "
            "model(**batch.inputs), or seqpar.unparallelize(model) first"
        )
    _refuse_what_would_be_lost(module, attention_mask, dropout, others)
    causal = others.get("is_causal")
    output = _attend(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        sequence,
        bool(getattr(module, "is_causal", True) if causal is None else causal),
        sliding_window,
        scaling,
    )
    return output, None


def install() -> None:
    """Register the attention and its mask function with transformers, once or again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, hf_attention)
    AttentionMaskInterface.register(ATTENTION_NAME, _no_mask)


@outside_graph  # one graph break a layer
def _attend(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    sequence: SequenceContext,
    causal: bool,
    window: int | None,
    scale: float | None,
) -> Tensor:
    q, k, v = autocast_together(q_BTHD, k_BTGD, v_BTGD)
    output = softmax_attention(
        held_tokens(q, sequence),
        held_tokens(k, sequence),
        held_tokens(v, sequence),
        layout=sequence.layout,
        group=sequence.group,
        strategy=sequence.strategy,
        causal=causal,
        window=window,
        scale=scale,
        check=False,
    )
    return refilled(output, q_BTHD.shape[1])


def _refuse_what_would_be_lost(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    name = type(module).__name__
    if attention_mask is not None:
        raise UnsupportedModelError(
            name,
            f"it was handed an attention mask of shape {tuple(attention_mask.shape)}",
            "leave masks to the layout: turn padding into documents with pack()",
        )
    if dropout:
        raise UnsupportedModelError(
            name,
            f"dropout {dropout} on the attention weights",
            "set the config's attention dropout to 0",
        )
    refuse_unknown(module, others)


def _no_mask(*, use_vmap: bool = False, **described: Any) -> None:
    """transformers asks for a mask; the layout is one already."""
    if described.get("attention_mask") is not None:
        raise LayoutError("a wrapped model takes no attention_mask: turn padding into documents")
    if use_vmap:
        raise UnsupportedModelError(
            type(described.get("config")).__name__,
            "the model adds a mask function of its own to its attention",
            "use a configuration without it, or another model",
        )
