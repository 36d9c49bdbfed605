"""The loss of a Hugging Face causal model without its logits: decoder, then the blockwise head."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from seqpar.adapters.sequence import SequenceContext, held_tokens, outside_graph
from seqpar.errors import UnsupportedModelError
from seqpar.head_loss import HeadImplementation, lm_head_loss_sum

__all__ = ["head_loss_sum"]

_loss_sum = outside_graph(lm_head_loss_sum)  # its loop over blocks would be compiled by length


def head_loss_sum(
    model: Any,
    labels: Tensor,
    implementation: HeadImplementation,
    *,
    sequence: SequenceContext,
    **inputs: Any,
) -> tuple[Tensor, Tensor]:
    """Run the model up to its last hidden states, and the head by blocks of tokens.

    It runs inside the model's own forward, where `fully_shard` has gathered the head's weight.
    Granite's scale and Gemma's cap of final logits are applied; tests/test_models.py compares it
    with the logits' loss for every family.

    Returns:
        What `lm_head_loss_sum` does: the sum over this rank's targets, and their number.

    Raises:
        UnsupportedModelError: a head that is more than one linear layer.
    """
    head = _plain_head(model)
    hidden = model.base_model(**inputs, sequence=sequence).last_hidden_state
    return _loss_sum(
        held_tokens(hidden, sequence),
        head.weight,
        labels,
        bias=head.bias,
        scale=1 / getattr(model.config, "logits_scaling", 1.0),
        softcap=getattr(model.config, "final_logit_softcapping", None),
        implementation=implementation,
    )


def _plain_head(model: Any) -> nn.Linear:
    name = type(model).__name__
    remedy = "compute logits and use seqpar.token_loss"
    if not name.removeprefix("FSDP").endswith("ForCausalLM"):
        raise UnsupportedModelError(name, "it is no causal model with one linear head", remedy)
    head = model.get_output_embeddings()
    if not (isinstance(head, nn.Linear) and type(head).__name__ == "Linear"):
        raise UnsupportedModelError(
            f"{name}'s head ({type(head).__name__})",
            "the blockwise loss needs a plain nn.Linear that is sharded with the model's root",
            remedy,
        )
    if type(head.weight).__name__ == "DTensor":
        raise UnsupportedModelError(
            f"{name}'s head", "its weight is sharded by itself", "leave it to the root's group"
        )
    return head
