"""docs/models.md's table, made from what is tested: `python -m tests.support_table`."""

from __future__ import annotations

from pathlib import Path

from seqpar.adapters.hf_models import ENCODER_DECODER_FAMILIES, FAMILIES, STATE_FAMILIES
from seqpar.adapters.tiny import tiny_model

PAGE = Path(__file__).parent.parent / "docs" / "models.md"
BEGIN, END = "<!-- made by tests/support_table.py -->", "<!-- end -->"

MIXERS = {
    "BambaMixer": "Mamba-2 state",
    "GraniteMoeHybridMambaLayer": "Mamba-2 state",
    "Mamba2Mixer": "Mamba-2 state",
    "MiniMaxLightningAttention": "lightning",
    "NemotronHMamba2Mixer": "Mamba-2 state",
    "DeepseekV3MoE": "experts",
    "GraniteMoeHybridMoE": "experts",
    "MixtralSparseMoeBlock": "experts",
    "NemotronHMoE": "experts",
    "Qwen3MoeSparseMoeBlock": "experts",
    "MiniMaxSparseMoeBlock": "experts",
}


def row(family: str) -> str:
    """One family: what its tiny model, the one that is tested, is made of."""
    model = tiny_model(family)
    names = [type(module).__name__ for module in model.modules()]
    parts = {MIXERS[name] for name in names if name in MIXERS}
    causal = {bool(module.is_causal) for module in model.modules() if hasattr(module, "is_causal")}
    if family in ENCODER_DECODER_FAMILIES:
        parts.add("softmax with position bias")
    elif causal:
        parts.add("softmax" if causal == {True} else "bidirectional softmax")
    if getattr(model.config, "sliding_window", None):
        parts.add("window")
    strategy = "gathered keys" if family in ENCODER_DECODER_FAMILIES else "as `strategy` says"
    if family in STATE_FAMILIES:
        strategy = f"{strategy}; states as `exchange` says" if causal else "as `exchange` says"
    return f"| {family} | {type(model).__name__} | {', '.join(sorted(parts))} | {strategy} |"


def table() -> str:
    """The page's table between its marks."""
    head = ["| model_type | tested class | layers | exchange |", "|---|---|---|---|"]
    return "\n".join([BEGIN, *head, *map(row, sorted(FAMILIES)), END])


def page_with(text: str) -> str:
    """The page with its table replaced."""
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    return before + text + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page_with(table()))
