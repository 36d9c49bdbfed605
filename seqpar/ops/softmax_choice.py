"""What a call of softmax attention asks for, and the strategy that it is given.

Legend: H query heads, G key/value heads, K key dim, V value dim, W ranks, N tokens of the stream.

Everything here follows from arguments that are the same on every rank, so every rank chooses alike;
`softmax_refusals` makes sure that they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Literal

from torch import Tensor

from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_tiles import Mask

__all__ = ["Call", "Strategy", "choose"]

Strategy = Literal["auto", "ring", "ulysses", "usp", "gather", "halo"]

FLOPS_PER_S = 550e12
"""cuDNN attention in bfloat16 on one H200, forward and backward together."""

BYTES_PER_S = 350e9
"""Between two H200s over NVLink, by NCCL or copy engines, large messages."""


@dataclass(frozen=True)
class Call:
    """The arguments that every rank shares."""

    layout: SequenceLayout
    key_layout: SequenceLayout
    is_cross: bool
    mask: Mask
    strategy: Strategy
    ulysses_degree: int | None
    batch: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    item_bytes: int

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: SequenceLayout,
        key_layout: SequenceLayout | None,
        mask: Mask,
        strategy: Strategy,
        ulysses_degree: int | None,
    ) -> Call:
        """Read the shapes: zeros for those of tensors that have too few dims, which are refused."""
        q_shape, k_shape, v_shape = ((*x.shape, 0, 0, 0, 0) for x in (q, k, v))
        return cls(
            layout=layout,
            key_layout=layout if key_layout is None else key_layout,
            is_cross=key_layout is not None,
            mask=mask,
            strategy=strategy,
            ulysses_degree=ulysses_degree,
            batch=q_shape[0],
            heads=q_shape[2],
            kv_heads=k_shape[2],
            key_dim=q_shape[3],
            value_dim=v_shape[3],
            item_bytes=q.element_size(),
        )


@lru_cache(maxsize=256)
def choose(call: Call) -> tuple[str, int]:
    """The strategy and its ulysses degree (1 where heads are not traded)."""
    size = call.layout.world_size
    if call.strategy == "auto":
        return _cheapest(call)
    if call.strategy == "usp":
        return "usp", call.ulysses_degree or gcd(size, call.kv_heads)
    return call.strategy, size if call.strategy == "ulysses" else 1


# -- auto -------------------------------------------------------------------------------------


def _cheapest(call: Call) -> tuple[str, int]:
    """The smaller of two estimates, for the slowest rank, in seconds.

    The ring hides its transfers under attention, but is as slow as its busiest rank, or as what
    that must fetch. Ulysses is balanced whatever the layout, but waits for its exchanges: q, k, v
    and out, and their gradients. `gather` is never cheaper than the ring: it fetches the same.
    """
    size = call.layout.world_size
    ring = "ring" if call.mask.window is None else "halo"
    if call.heads < size or size == 1:
        return ring, 1
    busiest, mean = _work(call)
    token_bytes = call.batch * call.item_bytes * (call.key_dim + call.value_dim)
    fetched = 2 * _most_fetched(call) * token_bytes * call.kv_heads  # in backward: once more
    queries, keys = (_most_tokens(layout) for layout in (call.layout, call.key_layout))
    traded = 2 * (queries * call.heads + keys * call.kv_heads) * token_bytes
    ring_s = max(busiest / FLOPS_PER_S, fetched / BYTES_PER_S)
    ulysses_s = mean / FLOPS_PER_S + traded / BYTES_PER_S
    return ("ulysses", size) if ulysses_s < ring_s else (ring, 1)


def _most_tokens(layout: SequenceLayout) -> int:
    return max(layout.tokens_on(rank) for rank in range(layout.world_size))


def _most_fetched(call: Call) -> int:
    """Key tokens that the busiest rank would have to gather from others."""
    if call.is_cross:
        return call.key_layout.num_tokens
    most = 0
    for rank, spans in enumerate(call.layout.spans):
        seen = [
            call.layout.visible_keys(span, causal=call.mask.causal, window=call.mask.window)
            for span in spans
        ]
        held = call.layout.tokens_on(rank)
        most = max(most, sum(span.num_tokens for span in seen) - held)
    return most


def _work(call: Call) -> tuple[float, float]:
    """Flops of attention, forward and backward, of the busiest rank and of the mean one."""
    layout, keys = call.layout, call.key_layout
    pairs = [0.0] * layout.world_size
    for rank in range(layout.world_size):
        for run in layout.runs(rank):
            start, stop = keys.cu_seqlens[run.document : run.document + 2]
            seen = float(stop - start)
            if call.mask.causal:
                seen = (run.start + run.stop + 1) / 2 - start
            if call.mask.window is not None:
                seen = min(seen, call.mask.window * (1.0 if call.mask.causal else 2.0))
            pairs[rank] += run.num_tokens * seen
    per_pair = 7 * call.batch * call.heads * (call.key_dim + call.value_dim)
    return per_pair * max(pairs), per_pair * sum(pairs) / len(pairs)
