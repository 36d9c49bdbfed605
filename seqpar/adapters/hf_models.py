"""Which Hugging Face models can be wrapped exactly, and why the others cannot.

A family is listed here when tests/test_models.py proves it (docs/models.md is made from those
tests). Everything else is refused when it is wrapped, by the name of the module that is at fault
if one is known: a model that trains on wrong numbers without a word is worse than none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from seqpar.adapters.mamba2 import mamba2_causal_forward, mamba2_mixer_forward
from seqpar.adapters.minimax import minimax_lightning_forward
from seqpar.adapters.t5 import t5_attention_forward
from seqpar.adapters.token_mixing import check_token_mixing
from seqpar.errors import UnsupportedModelError

__all__ = [
    "ENCODER_DECODER_FAMILIES",
    "FAMILIES",
    "SOFTMAX_FAMILIES",
    "STATE_FAMILIES",
    "Mixer",
    "check_supported",
    "hugging_face_model",
    "mixers_of",
    "whole_forward",
]

Mixer = Callable[..., Any]
"""A replacement forward of a token-mixing module: (module, hidden_states, *, sequence, ...)."""

SOFTMAX_FAMILIES = frozenset(
    {
        "bert",
        "deepseek_v3",
        "gemma2",
        "gemma3_text",
        "glm4",
        "gpt_neox",
        "granite",
        "helium",
        "llama",
        "ministral",
        "mistral",
        "mixtral",
        "modernbert",
        "olmo2",
        "olmo3",
        "phi3",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "smollm3",
        "starcoder2",
    }
)
STATE_FAMILIES = frozenset({"bamba", "granitemoehybrid", "mamba2", "minimax", "nemotron_h"})
ENCODER_DECODER_FAMILIES = frozenset({"t5"})
FAMILIES = SOFTMAX_FAMILIES | STATE_FAMILIES | ENCODER_DECODER_FAMILIES

_MIXERS: dict[str, Mixer] = {
    "BambaMixer": mamba2_mixer_forward,
    "GraniteMoeHybridMambaLayer": mamba2_mixer_forward,
    "Mamba2Mixer": mamba2_mixer_forward,
    "MiniMaxLightningAttention": minimax_lightning_forward,
    "NemotronHMamba2Mixer": mamba2_mixer_forward,
    "T5Attention": t5_attention_forward,
}
_WHOLE_FORWARDS: dict[str, Callable[..., Any]] = {"Mamba2ForCausalLM": mamba2_causal_forward}

_PER_TOKEN_HEADS = (
    "ForCausalLM",
    "ForConditionalGeneration",
    "ForMaskedLM",
    "ForTokenClassification",
    "LMHeadModel",
    "Model",
)
_ATTENTION_DROPOUTS = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")
_LENGTH_DEPENDENT_ROPE = frozenset({"dynamic", "longrope"})

_DELTA_RULE = (
    "a delta rule's state transition is a matrix for every token; state_attention carries a decay "
    "for each head"
)
_REFUSED_MIXERS = {
    "BailingHybridDeltaAttention": _DELTA_RULE,
    "KimiLinearDeltaAttention": _DELTA_RULE,
    "OlmoHybridGatedDeltaNet": _DELTA_RULE,
    "Qwen3NextGatedDeltaNet": _DELTA_RULE,
    "Qwen3_5GatedDeltaNet": _DELTA_RULE,
    "Qwen3_5MoeGatedDeltaNet": _DELTA_RULE,
    "FalconMambaMixer": "Mamba-1 decays every channel and state entry by itself",
    "JambaMambaMixer": "Mamba-1 decays every channel and state entry by itself",
    "MambaMixer": "Mamba-1 decays every channel and state entry by itself",
    "RecurrentGemmaRecurrentBlock": "its recurrence has a gate for each channel",
    "RwkvSelfAttention": "its recurrence has a decay for each channel",
}


def hugging_face_model(model: nn.Module) -> nn.Module | None:
    """The transformers model in a module: itself, or the base of a PEFT model; else None."""
    names = {(base.__module__.partition(".")[0], base.__name__) for base in type(model).__mro__}
    if ("peft", "PeftModel") in names:
        return hugging_face_model(model.get_base_model())  # type: ignore[operator]
    return model if ("transformers", "PreTrainedModel") in names else None


def whole_forward(model: nn.Module) -> Callable[..., Any] | None:
    """What to run in place of the model's own forward, if that drops the layout on its way."""
    return _WHOLE_FORWARDS.get(_kind(model).__name__)


def mixers_of(model: nn.Module) -> Iterator[tuple[nn.Module, Mixer]]:
    """Token-mixing modules that transformers' attention interface does not reach."""
    for module in model.modules():
        mixer = _MIXERS.get(_kind(module).__name__)
        if mixer is not None:
            yield module, mixer


def _kind(module: nn.Module) -> type[nn.Module]:
    """The class that a module's forward is of: `fully_shard` and users derive others from it."""
    return next(base for base in type(module).__mro__ if "forward" in vars(base))


def check_supported(model: nn.Module) -> None:
    """Refuse, by name, what cannot be made exact.

    Raises:
        UnsupportedModelError: the module, the reason, and what would work.
    """
    for name, module in model.named_modules():
        _check_mixer(name, module)
    _check_family(model)
    _check_head(model)
    _check_config(model.config)
    check_token_mixing(
        model,
        known=[module for module, _ in mixers_of(model)],
        remedy="leave the model's own layers in place, or write the model on seqpar's operators",
    )


def _check_mixer(name: str, module: nn.Module) -> None:
    """Refuse a mixer that is known not to work, and a changed one of those that do."""
    names = [base.__name__ for base in type(module).__mro__]
    reason = next((_REFUSED_MIXERS[name] for name in names if name in _REFUSED_MIXERS), None)
    if reason is not None:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__})",
            reason,
            f"wrap a model of another family: {', '.join(sorted(FAMILIES))}",
        )
    changed = next((name for name in names if name in _MIXERS), None)
    if changed is not None and _kind(module).__name__ != changed:
        raise UnsupportedModelError(
            f"{name} ({type(module).__name__})",
            f"it changes the forward of {changed}, which seqpar replaces by its own",
            f"use {changed} as it is, or write the model on seqpar's operators",
        )


def _check_family(model: nn.Module) -> None:
    config: Any = model.config
    kind = config.model_type
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            type(model).__name__,
            f"no test has shown the family {kind!r} to be exact",
            f"these are: {', '.join(sorted(FAMILIES))}; or write the model on seqpar's operators",
        )


def _check_head(model: nn.Module) -> None:
    name = type(model).__name__.removeprefix("FSDP")
    if not name.endswith(_PER_TOKEN_HEADS):
        raise UnsupportedModelError(
            name,
            "its head reads one place of each row, but a rank holds a part of many documents",
            f"wrap a class that ends in {', '.join(_PER_TOKEN_HEADS)}",
        )
    if getattr(model, "pooler", None) is not None:
        raise UnsupportedModelError(
            f"pooler ({type(model.pooler).__name__})",
            "it reads each row's first token, but a rank holds a part of many documents",
            f"build {name}(config, add_pooling_layer=False)",
        )


def _check_config(config: Any) -> None:
    name = type(config).__name__
    t5_dropout = ("dropout_rate",) if config.model_type in ENCODER_DECODER_FAMILIES else ()
    for option in (*_ATTENTION_DROPOUTS, *t5_dropout):
        rate = getattr(config, option, None)
        if rate:
            raise UnsupportedModelError(
                f"{name}.{option} = {rate}",
                "no exchange keeps dropout on attention weights the same for every degree",
                f"build the model with {option}=0.0 (other dropout stays)",
            )
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise UnsupportedModelError(
            f"{name}.attn_logit_softcapping = {config.attn_logit_softcapping}",
            "the softmax kernels have no soft cap on scores",
            "build the model with attn_logit_softcapping=None (final_logit_softcapping may stay)",
        )
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModelError(
            f"{name}.output_router_logits = True",
            "the load-balancing loss is a product of two means over all tokens; a rank has its own",
            "set it to False, or balance experts without a loss",
        )
    if getattr(config, "add_cross_attention", False):
        raise UnsupportedModelError(
            f"{name}.add_cross_attention = True",
            "its layers attend to tokens of a stream whose layout they are not told",
            "set it to False, or use T5 with seqpar.pack_pairs",
        )
    if getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedModelError(
            f"{name}.use_bidirectional_attention = {config.use_bidirectional_attention}",
            "no test has shown its attention in both directions to be exact",
            "set it to False, or use one of the encoders that docs/models.md lists",
        )
    for rope in _rope_types(config):
        if rope in _LENGTH_DEPENDENT_ROPE:
            raise UnsupportedModelError(
                f"{name}.rope_parameters, rope_type {rope!r}",
                "it changes with the longest position of the call, which differs between ranks",
                "use 'default', 'linear', 'llama3' or 'yarn'",
            )


def _rope_types(config: Any) -> Iterator[str]:
    parameters = getattr(config, "rope_parameters", None) or {}
    for value in (parameters, *parameters.values()):
        if isinstance(value, dict) and "rope_type" in value:
            yield value["rope_type"]
