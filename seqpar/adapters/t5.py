"""T5's attention (Hugging Face `t5`) over a scattered stream, relative position bias included.

Every score gets a learned bias by head and bucketed distance within the document (Raffel et al.,
arXiv 1910.10683, section 2.1), which no chunk kernel takes. So keys and values are gathered over
the group and each document part attends with its bias, recomputed in backward a block of queries
at a time. Right for the few thousand tokens that T5 is used with; it is not the ring.

The table of biases [buckets, H] travels from the first layer to the others in the argument that
transformers uses for the bias itself, so nothing of size T x T is passed on.

Shape letters: T query tokens of this rank, N key tokens of the stream, H heads, D head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from seqpar import comm
from seqpar.adapters.sequence import (
    SequenceContext,
    held_tokens,
    outside_graph,
    refilled,
    refuse_unknown,
)
from seqpar.errors import LayoutError
from seqpar.layout import SequenceLayout

__all__ = ["t5_attention_forward"]

_BLOCK_SCORES = 1 << 26  # scores of one block of queries: 256 MiB in fp32


def t5_attention_forward(
    module: Any,
    hidden_states: Tensor,
    *,
    sequence: SequenceContext,
    original: Any,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None, None]:
    """[1, T, E] -> [1, T, E], the table of biases for the next layers, and no weights.

    Raises:
        LayoutError: an encoder-decoder call without the encoder's layout.
        UnsupportedModelError: an argument that would change the result.
    """
    refuse_unknown(module, {**others, "mask": mask})
    source = sequence.source_layout
    if source is None:
        raise LayoutError("an encoder-decoder model needs a batch from seqpar.pack_pairs")
    crosses = key_value_states is not None
    queries = sequence.layout if module.is_decoder else source
    keys = source if crosses else queries
    states = hidden_states if key_value_states is None else key_value_states
    heads = (module.n_heads, module.key_value_proj_dim)
    table = position_bias
    if table is None and module.has_relative_attention_bias:
        # A copy: the next layers use it, when fully_shard has freed this one's weights.
        table = module.relative_attention_bias.weight.clone()
    mixed = _attend(
        module.q(hidden_states).unflatten(-1, heads),
        module.k(states).unflatten(-1, heads),
        module.v(states).unflatten(-1, heads),
        table,
        module,
        (queries, keys, sequence),
    )
    return module.o(mixed.flatten(-2)), table, None


@outside_graph
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor | None,
    module: Any,
    place: tuple[SequenceLayout, SequenceLayout, SequenceContext],
) -> Tensor:
    queries, keys, sequence = place
    num_tokens, rank = q.shape[1], sequence.rank
    q = held_tokens(q, sequence, queries)[0]
    held = (held_tokens(x, sequence, keys)[0] for x in (k, v))
    k_all, v_all = (_Gathered.apply(x, keys, sequence.group) for x in held)  # type: ignore[no-untyped-call]
    # Part of the graph on every rank, also one without queries: backward is a collective.
    used = (x for x in (k_all, v_all, table) if x is not None)
    parts = [q[:0] + sum(x[:0].sum() for x in used)]
    for run in queries.runs(rank):
        first = keys.cu_seqlens[run.document]
        stop = keys.cu_seqlens[run.document + 1]
        step = max(1, _BLOCK_SCORES // (q.shape[1] * (stop - first)))
        for start in range(run.start, run.stop, step):
            at = run.local_start + start - run.start
            count = min(step, run.stop - start)
            block = (q[at : at + count], k_all[first:stop], v_all[first:stop], table, module)
            offset = start - queries.cu_seqlens[run.document]
            parts.append(checkpoint(_attend_block, *block, offset, use_reentrant=False))
    return refilled(torch.cat(parts)[None], num_tokens)


def _attend_block(
    q_THD: Tensor, k_NHD: Tensor, v_NHD: Tensor, table: Tensor | None, module: Any, offset: int
) -> Tensor:
    """Queries at `offset` of their document against all its keys; T5 does not scale scores."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q_THD, k_NHD, v_NHD))
    bias = _bias(module, table, q.shape[2], k.shape[2], offset, q)
    return scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)[0].transpose(0, 1)


def _bias(
    module: Any, table: Tensor | None, num_queries: int, num_keys: int, offset: int, like: Tensor
) -> Tensor | None:
    """[1, H, T, N]: the table's entry for each distance, -inf for the future of a decoder."""
    at = torch.arange(offset, offset + num_queries, device=like.device)
    distance = torch.arange(num_keys, device=like.device)[None] - at[:, None]
    bias = None
    if table is not None:
        buckets = module._relative_position_bucket(
            distance,
            bidirectional=not module.is_decoder,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
        bias = torch.nn.functional.embedding(buckets, table).permute(2, 0, 1)[None].to(like.dtype)
    if not module.is_causal:
        return bias
    bias = like.new_zeros(1, 1, num_queries, num_keys) if bias is None else bias
    return bias.masked_fill(distance > 0, float("-inf"))


class _Gathered(torch.autograd.Function):
    """
    |          | in                    | out                   | communication                   |
    | forward  | x [T, H, D]           | x of the stream       | all_gather of the longest shard |
    | backward | grad of the stream    | grad of this shard    | all_reduce_sum of [N, H, D]     |
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: SequenceLayout, group: Any) -> Tensor:
        ctx.layout, ctx.group = layout, group
        lengths = [layout.tokens_on(rank) for rank in range(layout.world_size)]
        padded = x.new_zeros(max(lengths), *x.shape[1:])
        padded[: len(x)] = x
        gathered = comm.all_gather(padded, group).unbind(0)
        shards = [part[:length] for part, length in zip(gathered, lengths, strict=True)]
        return layout.unshard(shards, dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        total = comm.all_reduce_sum(grad, ctx.group)
        return ctx.layout.shard(total, comm.group_rank(ctx.group), dim=0), None, None
