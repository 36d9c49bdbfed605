"""Activation checkpointing of Hugging Face models by the name that their release has.

transformers 5.17 has `gradient_checkpointing_enable` alone; 5.23 warns of that name, which goes
with version 6, and has `activation_checkpointing_enable`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["keep_activations", "recompute_layers"]


def recompute_layers(model: nn.Module, *, use_reentrant: bool = False) -> None:
    """Recompute each layer in backward."""
    _named(model, "enable")({"use_reentrant": use_reentrant})


def keep_activations(model: nn.Module) -> None:
    """Undo it."""
    _named(model, "disable")()


def _named(model: Any, what: str) -> Any:
    new, old = f"activation_checkpointing_{what}", f"gradient_checkpointing_{what}"
    return getattr(model, new if hasattr(model, new) else old)
