"""Causal linear attention with decay: lightning attention, retention, simple GLA, Mamba-2."""

from seqpar.kernels.lightning.decoding import DecodingState
from seqpar.kernels.lightning.function import (
    Summary,
    attend,
    attend_backward,
    key_value_summary,
    lightning_attention,
    lightning_step,
    query_grad,
    query_grad_summary,
)

__all__ = [
    "DecodingState",
    "Summary",
    "attend",
    "attend_backward",
    "key_value_summary",
    "lightning_attention",
    "lightning_step",
    "query_grad",
    "query_grad_summary",
]
