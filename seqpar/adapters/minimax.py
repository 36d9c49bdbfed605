"""MiniMax-01's lightning attention (Hugging Face `minimax`) on seqpar's state operator.

Paper: MiniMax-01, arXiv 2501.08313, section 2.2; code: transformers, models/minimax. Its decay
convention is seqpar's: a token sees itself undecayed and its predecessor decayed once, with
log_decay = -slope for each head. The softmax layers go through the attention interface.

Shape letters: B batch (1), T tokens of this rank, E hidden size, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqpar.adapters.sequence import (
    SequenceContext,
    autocast_together,
    held_tokens,
    outside_graph,
    refilled,
    refuse_unknown,
)
from seqpar.ops.state import state_attention

__all__ = ["minimax_lightning_forward"]

_KEPT_DECAY = "_seqpar_log_decay"
"""On the layer: identity and version of its slope buffer, and the log decay made of it."""


def minimax_lightning_forward(
    module: Any,
    hidden_states: Tensor,
    *,
    sequence: SequenceContext,
    original: Any,
    **others: Any,
) -> tuple[Tensor, None]:
    """[B, T, E] -> [B, T, E], and None for the state that generation would cache.

    Positions are not used (the decay is the position), and a mask is the layout's business.
    """
    refuse_unknown(module, others)
    heads, dim = module.num_attention_heads, module.head_dim
    qkv = module.act_fn(module.qkv_proj(hidden_states))
    q, k, v = qkv.unflatten(-1, (heads, 3 * dim)).split(dim, dim=-1)
    mixed = _lightning(module, q, k, v, sequence).flatten(-2)
    gated = torch.sigmoid(module.output_gate(hidden_states)) * module.norm(mixed)
    return module.out_proj(gated), None


@outside_graph
def _lightning(
    module: Any, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, sequence: SequenceContext
) -> Tensor:
    together = autocast_together(q_BTHD, k_BTHD, v_BTHD)
    q, k, v = (held_tokens(x, sequence) for x in together)
    output, _ = state_attention(
        q,
        k,
        v,
        log_decay=_log_decay(module, q.device),
        layout=sequence.layout,
        group=sequence.group,
        exchange=sequence.exchange,
        check=False,
    )
    return refilled(output, q_BTHD.shape[1])


def _log_decay(module: Any, device: torch.device) -> Tensor:
    """float32 [H], the same tensor for as long as the model's buffer is the same.

    The state operator reads it on the host, once for each tensor. Made anew from the layer's number
    where the buffer was cast to 16 bits and lost digits.
    """
    slope: Tensor = module.slope_rate
    kept = getattr(module, _KEPT_DECAY, None)
    if kept is None or kept[:2] != (id(slope), slope._version) or kept[2].device != device:
        exact = slope if slope.dtype == torch.float32 else module.get_slope_rate()
        kept = (id(slope), slope._version, -exact.to(device).flatten())
        object.__setattr__(module, _KEPT_DECAY, kept)
    log_decay_H: Tensor = kept[2]
    return log_decay_H
