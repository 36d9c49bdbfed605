"""Mamba-2's mixer on seqpar's operators: Mamba-2, Bamba, Nemotron-H and Granite hybrid.

Paper: Dao and Gu, arXiv 2405.21060; code: transformers, models/mamba2. A mixer is a short causal
convolution (a halo of its width from the neighbour) and a state with a decay for each token and
head. In the state operator's words: q = C, k = B, v = dt x, log_decay = dt A, and D x is added.

Shape letters: B batch (1), T tokens of this rank, E hidden size, H heads, P head dim, G groups,
N state size, C channels of the convolution.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import softplus

from seqpar.adapters.sequence import (
    SequenceContext,
    held_tokens,
    outside_graph,
    refilled,
    refuse_unknown,
)
from seqpar.ops.halo import short_convolution
from seqpar.ops.state import state_attention

__all__ = ["mamba2_causal_forward", "mamba2_mixer_forward"]


def mamba2_causal_forward(
    model: Any, *, sequence: SequenceContext, use_cache: bool = False, **inputs: Any
) -> Any:
    """Mamba2ForCausalLM's forward, which keeps what it is called with from its layers."""
    from transformers.models.mamba2.modeling_mamba2 import Mamba2CausalLMOutput

    hidden = model.backbone(**inputs, use_cache=use_cache, sequence=sequence).last_hidden_state
    logits = model.lm_head(hidden.to(model.lm_head.weight.dtype)).float()
    return Mamba2CausalLMOutput(logits=logits)


def mamba2_mixer_forward(
    module: Any,
    hidden_states: Tensor,
    *,
    sequence: SequenceContext,
    original: Any,
    cache_params: None = None,
    **others: Any,
) -> Tensor:
    """[B, T, E] -> [B, T, E]."""
    refuse_unknown(module, others)
    inner, groups = module.intermediate_size, module.n_groups * module.ssm_state_size
    projected = module.in_proj(hidden_states)
    gate, mixed, dt = projected.split([inner, module.conv_dim, module.num_heads], dim=-1)
    mixed = module.act(_convolution(module, mixed, sequence))
    x, b, c = mixed.split([inner, groups, groups], dim=-1)
    scanned = _scan(module, x, b, c, dt, sequence)
    out: Tensor = module.out_proj(module.norm(scanned.flatten(-2), gate).to(hidden_states.dtype))
    return out


@outside_graph
def _convolution(module: Any, x_BTC: Tensor, sequence: SequenceContext) -> Tensor:
    output = short_convolution(
        held_tokens(x_BTC, sequence),
        module.conv1d.weight.squeeze(1),
        module.conv1d.bias,
        layout=sequence.layout,
        group=sequence.group,
        check=False,
    )
    return refilled(output, x_BTC.shape[1])


def _scan(
    module: Any, x: Tensor, b: Tensor, c: Tensor, dt: Tensor, sequence: SequenceContext
) -> Tensor:
    """[B, T, H, P]; the step sizes and the decays are float32, as the paper's code has them."""
    heads, groups = module.num_heads, module.n_groups
    low, high = module.time_step_limit
    step_BTH = softplus(dt.float() + module.dt_bias.float()).clamp(low, high)
    log_decay_BTH = step_BTH * -module.A_log.float().exp()
    x_BTHP = x.view(*x.shape[:2], heads, module.head_dim)
    b_BTHN, c_BTHN = (
        part.view(*part.shape[:2], groups, -1).repeat_interleave(heads // groups, 2)
        for part in (b, c)
    )
    values = (x_BTHP * step_BTH[..., None]).to(x.dtype)
    mixed = _state(c_BTHN, b_BTHN, values, log_decay_BTH, sequence)
    skipped: Tensor = x_BTHP * module.D[:, None]
    return mixed + skipped


@outside_graph
def _state(
    q_BTHN: Tensor, k_BTHN: Tensor, v_BTHP: Tensor, decay_BTH: Tensor, sequence: SequenceContext
) -> Tensor:
    q, k, v, decay = (held_tokens(x, sequence) for x in (q_BTHN, k_BTHN, v_BTHP, decay_BTH))
    output, _ = state_attention(
        q,
        k,
        v,
        log_decay=decay,
        layout=sequence.layout,
        group=sequence.group,
        exchange=sequence.exchange,
        check=False,
    )
    return refilled(output, q_BTHN.shape[1])
