"""What a call of softmax attention asks for: refused by name, or given a strategy.

Legend: H query heads, G key/value heads, K key dim, V value dim, W ranks, N tokens of the stream.

Everything here follows from arguments that are the same on every rank, so every rank refuses or
chooses alike; only a rank's own tensor shapes need one exchange (`comm.agree`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Literal, get_args

from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.errors import LayoutError, MeshError, SeqparError
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_tiles import Mask

__all__ = ["Call", "Strategy", "choose", "refuse"]

Strategy = Literal["auto", "ring", "ulysses", "usp", "gather", "halo"]

FLOPS_PER_S = 550e12
"""cuDNN attention in bfloat16 on one H200, forward and backward together."""

BYTES_PER_S = 350e9
"""NCCL between two H200s over NVLink, large messages."""


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
        """Read the shapes; tensors of other than four dims are refused here, on each rank alone."""
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 4:
                raise LayoutError(f"{name} must be [batch, tokens, heads, dim], got {x.shape}")
        return cls(
            layout=layout,
            key_layout=layout if key_layout is None else key_layout,
            is_cross=key_layout is not None,
            mask=mask,
            strategy=strategy,
            ulysses_degree=ulysses_degree,
            batch=q.shape[0],
            heads=q.shape[2],
            kv_heads=k.shape[2],
            key_dim=q.shape[3],
            value_dim=v.shape[3],
            item_bytes=q.element_size(),
        )


def refuse(
    call: Call,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: ProcessGroup | None,
    *,
    scale: float | None,
    check: bool,
) -> None:
    """Raise what is wrong with the call, on every rank, before anything is sent."""
    size = comm.group_size(group)
    if call.layout.world_size != size:
        raise MeshError(
            f"the layout scatters the stream over {call.layout.world_size} ranks, the group has "
            f"{size}: make the layout for this group"
        )
    error = _call_error(call) or _tensor_error(call, q, k, v, comm.group_rank(group))
    if not check or group is None:
        if error is not None:
            raise error
        return
    same = (hash(call.layout), hash(call.key_layout), call.mask, call.strategy, scale)
    comm.agree(
        None if error is None else str(error),
        group,
        same=(*same, call.ulysses_degree, call.batch, call.heads, call.kv_heads, q.dtype),
        error=LayoutError if error is None else type(error),
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


@lru_cache(maxsize=256)
def _call_error(call: Call) -> SeqparError | None:
    return _mask_error(call) or _heads_error(call)


def _mask_error(call: Call) -> SeqparError | None:
    window, queries, keys = call.mask.window, call.layout, call.key_layout
    if call.strategy not in get_args(Strategy):
        return LayoutError(f"no strategy {call.strategy!r}: one of {', '.join(get_args(Strategy))}")
    if window is not None and window < 1:
        return LayoutError(f"window={window}: it counts the query itself, so it is at least 1")
    if call.strategy == "halo" and window is None:
        return LayoutError("strategy 'halo' needs a window: without one use 'gather' or 'ring'")
    if not call.is_cross:
        return None
    if queries.num_documents != keys.num_documents:
        return LayoutError(
            f"queries hold {queries.num_documents} documents, keys {keys.num_documents}: document "
            f"d of the queries sees document d of the keys, so the numbers must be equal"
        )
    if queries.world_size != keys.world_size:
        return LayoutError(
            f"queries are scattered over {queries.world_size} ranks, keys over {keys.world_size}"
        )
    if call.mask.causal or window is not None:
        return LayoutError(
            f"cross-attention has no order between queries and keys: causal={call.mask.causal} and "
            f"{window=} must be False and None"
        )
    return None


def _heads_error(call: Call) -> SeqparError | None:
    size, heads, kv_heads, degree = (
        call.layout.world_size,
        call.heads,
        call.kv_heads,
        call.ulysses_degree,
    )
    if not kv_heads or heads % kv_heads:
        return LayoutError(f"{heads} query heads are no multiple of {kv_heads} key/value heads")
    if degree is not None and call.strategy != "usp":
        return MeshError(f"ulysses_degree={degree} is for strategy 'usp', not {call.strategy!r}")
    if degree is not None and (degree < 1 or size % degree):
        return MeshError(f"ulysses_degree={degree} does not divide the group of {size} ranks")
    traded = size if call.strategy == "ulysses" else (degree or 1)
    if heads < traded:
        return MeshError(
            f"{heads} query heads cannot be dealt out to {traded} ranks: use strategy 'ring', or "
            f"'usp' with an ulysses_degree that divides {size} and is at most {heads}"
        )
    return None


def _tensor_error(call: Call, q: Tensor, k: Tensor, v: Tensor, rank: int) -> SeqparError | None:
    queries, keys = call.layout.tokens_on(rank), call.key_layout.tokens_on(rank)
    expected = {
        "q": (call.batch, queries, call.heads, call.key_dim),
        "k": (call.batch, keys, call.kv_heads, call.key_dim),
        "v": (call.batch, keys, call.kv_heads, call.value_dim),
    }
    for (name, shape), x in zip(expected.items(), (q, k, v), strict=True):
        if tuple(x.shape) != shape:
            return LayoutError(
                f"{name} of rank {rank} is {tuple(x.shape)}, where the layout and q give {shape} "
                f"[batch, tokens, heads, dim]: shard it with this layout first"
            )
        if (x.dtype, x.device) != (q.dtype, q.device):
            return LayoutError(
                f"{name} of rank {rank} is {x.dtype} on {x.device}, q is {q.dtype} on {q.device}"
            )
    return None


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
    most_tokens = max(call.layout.tokens_on(rank) for rank in range(size))
    traded = 2 * most_tokens * token_bytes * (call.heads + call.kv_heads)
    ring_s = max(busiest / FLOPS_PER_S, fetched / BYTES_PER_S)
    ulysses_s = mean / FLOPS_PER_S + traded / BYTES_PER_S
    return ("ulysses", size) if ulysses_s < ring_s else (ring, 1)


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
