"""Which family of Hugging Face models a name means, and why one that cannot be checked is refused.

A name is a `model_type` ("llama"), a configuration's or model's class ("LlamaConfig",
"LlamaForCausalLM"), or one of the package's own architectures. Nothing is downloaded: a name on
the hub is refused.
"""

from __future__ import annotations

import functools
from typing import NoReturn

import torch

from seqpar.adapters.hf_models import check_supported
from seqpar.adapters.tiny import TINY_FAMILIES
from seqpar.errors import UnsupportedModelError

__all__ = ["family_of"]

_HEADS = ("CausalLM", "MaskedLM", "Seq2SeqLM")


def family_of(name: str) -> str:
    """The family that a name means, one of TINY_FAMILIES.

    Raises:
        UnsupportedModelError: a family that cannot be wrapped, with the module that is at fault
            and the reason; or a name that means none.
    """
    if name in TINY_FAMILIES:
        return name
    family = _model_types().get(name)
    if family in TINY_FAMILIES:
        return family
    if family is not None:
        _refuse(family)
    raise UnsupportedModelError(
        name,
        "it is no family of Hugging Face models that is installed here (nothing is downloaded)",
        f"name one of {', '.join(TINY_FAMILIES)}, or package.module:function that builds a model",
    )


@functools.cache
def _model_types() -> dict[str, str]:
    """model_type by each name that means it; empty without transformers."""
    try:
        from transformers.models.auto import configuration_auto, modeling_auto
    except ImportError:
        return {}
    configs: dict[str, str] = dict(configuration_auto.CONFIG_MAPPING_NAMES)
    names = {config: family for family, config in configs.items()}
    for head in ("MODEL", *(f"MODEL_FOR_{head}" for head in ("CAUSAL_LM", "MASKED_LM"))):
        classes = getattr(modeling_auto, f"{head}_MAPPING_NAMES")
        names |= {model: family for family, model in classes.items() if isinstance(model, str)}
    return {**names, **{family: family for family in configs}}


def _refuse(family: str) -> NoReturn:
    """Build the family's default model without memory and refuse what `parallelize` would."""
    import transformers

    try:
        config = transformers.AutoConfig.for_model(family)
        build = next(
            getattr(transformers, f"AutoModelFor{head}")
            for head in _HEADS
            if type(config) in getattr(transformers, f"AutoModelFor{head}")._model_mapping
        )
        with torch.device("meta"):
            model = build.from_config(config)
    except Exception:  # other people's constructors: what they need is not what was asked
        model = None
    if model is not None:
        check_supported(model)
    raise UnsupportedModelError(
        family,
        "no test has shown this family to be exact",
        f"these are: {', '.join(TINY_FAMILIES)}; or write the model on seqpar's operators",
    )
