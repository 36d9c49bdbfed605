"""Tiny random models of the families that can be wrapped: for tests and `seqpar check`.

They are built from configurations; nothing is downloaded. The sizes are awkward on purpose:
fewer key/value heads than ranks, a window shorter than the shards, an odd vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.adapters.hf_models import FAMILIES
from seqpar.batch import PackedStream, pack, pack_pairs
from seqpar.errors import MissingExtraError, UnsupportedModelError
from seqpar.models.decoder import Decoder, hybrid, transnormer

__all__ = ["TINY_FAMILIES", "TINY_VOCABULARY", "tiny_model", "tiny_stream"]

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
    "bamba": {
        **_DECODER,
        "num_hidden_layers": 3,
        "attn_layer_indices": [1],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "mamba_chunk_size": 8,
    },
    "bert": {**_ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "gemma2": {
        **_DECODER,
        **_WINDOWED,
        "head_dim": 8,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": 2.0,  # low enough to be felt by so small a model
    },
    "gemma3_text": {**_DECODER, **_WINDOWED, "head_dim": 8},
    "deepseek_v3": {
        **_DECODER,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "moe_intermediate_size": 16,
    },
    "glm4": {**_DECODER, "head_dim": 8},
    "gpt_neox": {k: v for k, v in _DECODER.items() if k != "num_key_value_heads"},
    "granite": {**_DECODER, "logits_scaling": 2.0, "residual_multiplier": 0.5},
    "granitemoehybrid": {
        **_DECODER,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "mamba_n_groups": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 16,
    },
    "helium": {**_DECODER, "head_dim": 8},
    "llama": _DECODER,
    "mamba2": {
        "hidden_size": 32,
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "num_hidden_layers": 2,
    },
    "nemotron_h": {
        **_DECODER,
        "head_dim": 8,
        "layers_block_type": ["mamba", "moe", "attention", "mamba"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16,
        "attention_dropout": 0.0,
    },
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
    "ministral": {**_DECODER, **_WINDOWED, "head_dim": 8},
    "mixtral": {**_DECODER, "num_local_experts": 4},
    "modernbert": {
        **_ENCODER,
        "local_attention": 6,
        "global_attn_every_n_layers": 2,
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "olmo2": _DECODER,
    "olmo3": {**_DECODER, **_WINDOWED},
    "phi3": _DECODER,
    "qwen2": _DECODER,
    "qwen3_moe": {
        **_DECODER,
        "head_dim": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },
    "smollm3": _DECODER,
    "starcoder2": {
        **_DECODER,
        "sliding_window": 7,
        "residual_dropout": 0.0,
        "embedding_dropout": 0.0,
    },
    "t5": {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 16,
        "dropout_rate": 0.0,
        "decoder_start_token_id": 0,
    },
    "qwen3": {**_DECODER, "head_dim": 8},
}
_OWN = {
    "seqpar-hybrid": hybrid(
        vocab_size=TINY_VOCABULARY,
        dim=32,
        num_layers=3,
        num_heads=4,
        hidden=48,
        softmax_every=3,
        softmax_heads=4,
        softmax_kv_heads=2,
        softmax_head_dim=8,
    ),
    "seqpar-transnormer": transnormer(
        vocab_size=TINY_VOCABULARY, dim=32, num_layers=2, num_heads=4, hidden=48
    ),
}
"""The package's own architectures, by the names that `seqpar check` takes."""

_AUTO_CLASSES = {
    "bert": "AutoModelForMaskedLM",
    "modernbert": "AutoModelForMaskedLM",
    "t5": "AutoModelForSeq2SeqLM",
}


TINY_FAMILIES = (*sorted(FAMILIES), *sorted(_OWN))
"""Every name that `tiny_model` takes."""


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> nn.Module:
    """A random model of a family that `parallelize` takes, tens of thousands of parameters.

    Args:
        family: a `model_type` of transformers that `parallelize` takes, or one of the package's
            own architectures: one of TINY_FAMILIES.
        seed: of the weights; the caller's random state is left alone.
        overrides: options of a transformers family's configuration.

    Raises:
        UnsupportedModelError: no such family.
        MissingExtraError: transformers is not installed.
    """
    if family not in TINY_FAMILIES:
        raise UnsupportedModelError(
            family, "there is no tiny model of it", f"choose from {', '.join(TINY_FAMILIES)}"
        )
    if family in _OWN:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            own = Decoder(_OWN[family])
            _spread(own)
        return own
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "hf", f"a tiny {family} model") from error
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(
        family, vocab_size=TINY_VOCABULARY, **{**special, **_SIZES[family], **overrides}
    )
    build = getattr(transformers, _AUTO_CLASSES.get(family, "AutoModelForCausalLM"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = build.from_config(config)
        _spread(model)
    return model


def tiny_stream(model: nn.Module, lengths: Sequence[int], *, seed: int = 0) -> PackedStream:
    """Random documents of the given lengths, with the labels that the model's kind wants."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = _vocabulary(model)

    def documents(counts: Sequence[int]) -> list[Tensor]:
        low = min(3, vocabulary - 1)
        return [torch.randint(low, vocabulary, (n,), generator=generator) for n in counts]

    name = type(model).__name__
    if name.endswith("ForConditionalGeneration"):
        return pack_pairs(documents([n // 2 + 3 for n in lengths]), documents(lengths))
    return pack(documents(lengths), shift_labels=not name.endswith("ForMaskedLM"))


def _vocabulary(model: nn.Module) -> int:
    """Rows of the first embedding: by convention the tokens'."""
    tables = (m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    return next(tables, TINY_VOCABULARY)


@torch.no_grad()
def _spread(model: nn.Module) -> None:
    """Larger weights than the initial ones, so that attention is not nearly uniform."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name:
            parameter.mul_(4.0)
