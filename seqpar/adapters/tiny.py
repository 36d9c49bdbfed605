"""Tiny random models of the families that can be wrapped: for tests and `seqpar check`.

They are built from configurations; nothing is downloaded. The sizes are awkward on purpose:
fewer key/value heads than ranks, a window shorter than the shards, an odd vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from seqpar.adapters.hf_models import FAMILIES
from seqpar.errors import MissingExtraError, UnsupportedModelError

__all__ = ["TINY_VOCABULARY", "masked_language_model", "tiny_model"]

TINY_VOCABULARY = 61

_DECODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_WINDOWED = {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]}
_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}

_SIZES: dict[str, dict[str, Any]] = {
    "bert": {**_ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gemma2": {**_DECODER, **_WINDOWED, "head_dim": 8, "attn_logit_softcapping": None},
    "gemma3_text": {**_DECODER, **_WINDOWED, "head_dim": 8},
    "gpt_neox": {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"},
    "llama": _DECODER,
    "minimax": {
        **_DECODER,
        "head_dim": 8,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "block_size": 8,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "mistral": {**_DECODER, "sliding_window": 7},
    "modernbert": {
        **_ENCODER,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "qwen3": {**_DECODER, "head_dim": 8},
}
_MASKED = frozenset({"bert", "modernbert"})


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random model of a family that `parallelize` takes, tens of thousands of parameters.

    Args:
        family: a `model_type` of transformers, one of `seqpar.adapters.hf_models.FAMILIES`.
        seed: of the weights; the caller's random state is left alone.
        overrides: options of the family's configuration.

    Raises:
        UnsupportedModelError: no such family.
        MissingExtraError: transformers is not installed.
    """
    if family not in _SIZES:
        raise UnsupportedModelError(
            family, "there is no tiny model of it", f"choose from {', '.join(sorted(FAMILIES))}"
        )
    try:
        from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", f"a tiny {family} model") from error
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(
        family, vocab_size=TINY_VOCABULARY, **{**special, **_SIZES[family], **overrides}
    )
    build = AutoModelForMaskedLM if family in _MASKED else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = build.from_config(config)
        _spread(model)
    return model


def masked_language_model(model: nn.Module) -> bool:
    """Whether the model predicts each token at its own place, so that labels are not shifted."""
    return type(model).__name__.endswith("ForMaskedLM")


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Larger weights than the initial ones, so that attention is not nearly uniform."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name:
            parameter.mul_(4.0)
