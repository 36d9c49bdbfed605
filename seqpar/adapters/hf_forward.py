"""The forward of a wrapped Hugging Face model: admit the call, pass the layout down."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from seqpar.adapters.hf_head import head_loss_sum
from seqpar.adapters.wrapping import Bound, wrapping_of
from seqpar.head_loss import HeadImplementation
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_choice import Strategy

__all__ = ["hugging_face_forward"]


def hugging_face_forward(
    self: Any,
    *args: Any,
    layout: SequenceLayout | None = None,
    group: Any = Bound,
    strategy: Strategy | None = None,
    source_layout: SequenceLayout | None = None,
    head_labels: Tensor | None = None,
    head_implementation: HeadImplementation = "auto",
    original: Callable[..., Any],
    whole: Callable[..., Any] | None,
    **inputs: Any,
) -> Any:
    """What `parallelize` puts in place of the model's own forward.

    Args:
        layout, source_layout, group: of the batch; the group that was wrapped with by default.
        strategy: of this call's softmax layers; the one that was wrapped with by default.
        head_labels: return the blockwise head's loss sum instead of an output.
        head_implementation: of that sum; see `lm_head_loss_sum`.
        original, whole: the model's own forward, and what to run in its place if it drops the
            layout on its way.
    """
    if whole is not None:
        original = functools.partial(whole, self)
    if head_labels is not None:
        original = functools.partial(head_loss_sum, self, head_labels, head_implementation)
    if args:
        inputs = {"input_ids": args[0], **inputs}
    tokens, source_tokens = _first(inputs, "input_ids", "inputs_embeds"), None
    if self.config.is_encoder_decoder:
        source_tokens = tokens
        tokens = _first(inputs, "decoder_input_ids", "decoder_inputs_embeds")
    sequence = wrapping_of(self).context(
        layout,
        group,
        tokens,
        strategy=strategy,
        source_layout=source_layout,
        source_tokens=source_tokens,
        positions=inputs.get("position_ids"),
        problem=_refusal(args, inputs),
    )
    inputs["use_cache"] = False
    if source_layout is None and inputs.get("position_ids") is None:
        assert tokens is not None  # or the context would have refused
        positions = sequence.layout.position_ids(sequence.rank)
        inputs["position_ids"] = positions[None].to(tokens.device)
    output = original(**_padded(inputs), sequence=sequence)
    return output if sequence.num_tokens else _cut_tokens(output)


def _first(inputs: dict[str, Any], *names: str) -> Tensor | None:
    return next((inputs[name] for name in names if inputs.get(name) is not None), None)


_REFUSED_INPUTS = {
    "past_key_values": "caches are for generation: unparallelize the model first",
    "cache_params": "caches are for generation: unparallelize the model first",
    "use_cache": "caches are for generation: unparallelize the model first",
    "attention_mask": "turn padding into documents with pack(), the layout is the mask",
    "labels": "compute the loss with seqpar.token_loss(output.logits, batch, mesh=mesh)",
    "logits_to_keep": "take the logits of the tokens wanted from the output",
    "output_attentions": "attention weights exist on no rank",
}


def _refusal(args: tuple[Any, ...], inputs: dict[str, Any]) -> str | None:
    """Why this call cannot be made exact; None if it can."""
    if len(args) > 1:
        return "pass a wrapped model's inputs by name: model(**batch.inputs)"
    for name, remedy in _REFUSED_INPUTS.items():
        value = inputs.get(name)
        if value is not None and (isinstance(value, Tensor) or value):
            return f"a wrapped model takes no {name}: {remedy}"
    return None


def _padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """One token in place of none: reshapes in models cannot infer a size from nothing."""
    return {
        name: value.new_zeros(1, 1, *value.shape[2:])
        if isinstance(value, Tensor) and value.shape[:2] == (1, 0)
        else value
        for name, value in inputs.items()
    }


def _cut_tokens(output: Any) -> Any:
    """Take that one token out of the output again."""
    if isinstance(output, Tensor):
        return output[:, :0] if output.ndim >= 3 and output.shape[:2] == (1, 1) else output
    if isinstance(output, dict):
        for name in list(output):
            output[name] = _cut_tokens(output[name])
        return output
    return tuple(map(_cut_tokens, output)) if isinstance(output, tuple) else output
