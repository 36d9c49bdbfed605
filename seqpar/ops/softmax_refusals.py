"""What is wrong with a call of softmax attention: said by name, on every rank, before a message.

Legend: H query heads, G key/value heads, K key dim, V value dim, W ranks.

Most of it follows from arguments that are the same on every rank, so every rank refuses alike. What
a rank alone may have wrong (its tensors, a layout for another group) needs one exchange of 16 bytes
(`comm.agree`).
"""

from __future__ import annotations

from functools import lru_cache
from math import inf
from typing import get_args

from torch import Tensor
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.errors import KernelInputError, LayoutError, MeshError, SeqparError
from seqpar.layout import SequenceLayout
from seqpar.ops.softmax_choice import Call, Strategy
from seqpar.ops.softmax_local import choose_backend

__all__ = ["refuse"]


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
    error = (
        _option_error(call, scale)
        or _dims_error(q, k, v)
        or _call_error(call, comm.group_size(group))
        or _tensor_error(call, q, k, v, comm.group_rank(group))
        or _kernel_error(q, v)
    )
    if not check or group is None:
        if error is not None:
            raise error
        return
    comm.agree(
        None if error is None else str(error),
        group,
        same=None if error is not None else _same(call, q, scale),
        error=LayoutError if error is None else type(error),
    )


def _same(call: Call, q: Tensor, scale: float | None) -> tuple[object, ...]:
    """What must be equal on all ranks, layouts by their hashes."""
    shapes = (call.batch, call.heads, call.kv_heads, call.key_dim, call.value_dim, q.dtype)
    options = (call.mask, call.strategy, call.ulysses_degree, scale)
    return (hash(call.layout), hash(call.key_layout), call.is_cross, *options, *shapes)


def _option_error(call: Call, scale: object) -> SeqparError | None:
    """Options of a type or value that no call can have."""
    window: object = call.mask.window
    degree: object = call.ulysses_degree
    layouts: dict[str, object] = {"layout": call.layout, "key_layout": call.key_layout}
    for name, layout in layouts.items():
        if not isinstance(layout, SequenceLayout):
            return LayoutError(f"{name} must be a SequenceLayout, got {layout!r:.40}")
    if call.strategy not in get_args(Strategy):
        return LayoutError(f"no strategy {call.strategy!r}: one of {', '.join(get_args(Strategy))}")
    if window is not None and (not isinstance(window, int) or window < 1):
        return LayoutError(
            f"window={window!r}: it counts keys, the query itself among them: 1, 2 …"
        )
    if degree is not None and not isinstance(degree, int):
        return MeshError(f"ulysses_degree={degree!r}: it counts ranks: 1, 2, ...")
    if scale is not None and not (isinstance(scale, int | float) and 0 < scale < inf):
        return LayoutError(
            f"scale={scale!r} must be a positive, finite number: multiply q by a sign or by a "
            f"learned factor instead"
        )
    return None


def _dims_error(q: Tensor, k: Tensor, v: Tensor) -> SeqparError | None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            return LayoutError(
                f"{name} must be [batch, tokens, heads, dim], got {list(x.shape)}: {x.ndim} dims"
            )
    return None


@lru_cache(maxsize=256)
def _call_error(call: Call, group_size: int) -> SeqparError | None:
    return _layout_error(call, group_size) or _mask_error(call) or _heads_error(call)


def _layout_error(call: Call, group_size: int) -> SeqparError | None:
    queries, keys = call.layout, call.key_layout
    if queries.world_size != group_size:
        return MeshError(
            f"the layout scatters the stream over {queries.world_size} ranks, the group has "
            f"{group_size}: make the layout for this group"
        )
    if queries.num_documents != keys.num_documents:
        return LayoutError(
            f"queries hold {queries.num_documents} documents, keys {keys.num_documents}: document "
            f"d of the queries sees document d of the keys, so the numbers must be equal"
        )
    if queries.world_size != keys.world_size:
        return LayoutError(
            f"queries are scattered over {queries.world_size} ranks, keys over {keys.world_size}"
        )
    return None


def _mask_error(call: Call) -> SeqparError | None:
    causal, window = call.mask.causal, call.mask.window
    if call.strategy == "halo" and window is None:
        return LayoutError("strategy 'halo' needs a window: without one use 'gather' or 'ring'")
    if call.is_cross and (causal or window is not None):
        return LayoutError(
            f"cross-attention has no order between queries and keys: {causal=} and {window=} must "
            f"be False and None"
        )
    return None


def _heads_error(call: Call) -> SeqparError | None:
    size, heads, kv_heads, degree = (
        call.layout.world_size,
        call.heads,
        call.kv_heads,
        call.ulysses_degree,
    )
    if not heads or not kv_heads or heads % kv_heads:
        return LayoutError(f"{heads} query heads are no multiple of {kv_heads} key/value heads")
    if not call.key_dim:
        return LayoutError("queries and keys have a head dim of 0: it must be at least 1")
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


def _kernel_error(q: Tensor, v: Tensor) -> SeqparError | None:
    try:
        choose_backend(q, v)
    except KernelInputError as error:
        return error
    return None
