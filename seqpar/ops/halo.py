"""What a span needs of the tokens just left of it, by neighbour messages only.

Legend: B batch, T tokens on this rank, C channels, W taps of a convolution.

The halo of a span is the last `width` tokens before it, as far as they belong to the document of
its first token. Its owners send them, usually the one left neighbour; shards smaller than the halo
make it several. Nothing is gathered, so bytes do not grow with the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from seqpar import comm
from seqpar.errors import LayoutError
from seqpar.layout import SequenceLayout
from seqpar.ops.steps import Steps, Swap, run_steps

__all__ = ["halo_grad_steps", "halo_steps", "left_halo", "short_convolution"]


def left_halo(
    x: Tensor, *, width: int, layout: SequenceLayout, group: ProcessGroup | None, check: bool = True
) -> Tensor:
    """The `width` tokens left of each of this rank's spans; zero where a document begins later.

    Differentiable: backward sends the gradients to the tokens' owners and adds them there. Bytes
    received: of one token, times the tokens of this rank's halos that other ranks hold; backward,
    times the tokens of other ranks' halos that this rank holds, each as often as it was sent.

    Args:
        x: [B, T, ...], this rank's shard.
        width: how many tokens, at least 1.
        check: refuse a tensor that does not fit on all ranks alike (see `state_attention`).

    Returns:
        [B, spans, width, ...] in x's dtype; the last token of a halo is the span's neighbour.

    Raises:
        LayoutError: x does not fit the layout, or the width is under 1.
    """
    rank = comm.group_rank(group)
    problem = _problem(x, width, layout, group, rank)
    if check:
        same = (layout.world_size, layout.num_tokens, width, x.shape[0], x.shape[2:], x.dtype)
        comm.agree(problem, group, same=same)
    elif problem is not None:
        raise LayoutError(problem)
    halo: Tensor = _LeftHalo.apply(x, width, layout, group)  # type: ignore[no-untyped-call]
    return halo


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: SequenceLayout,
    group: ProcessGroup | None,
    check: bool = True,
) -> Tensor:
    """The depthwise causal convolution of Mamba-2 and its kin, over a scattered stream.

    y_t = Σ_i weight[:, i] x_(t - (W - 1) + i) + bias, from the token's own document alone. Sums are
    float32, the result is in x's dtype. Differentiable; gradients of weight and bias are of the
    local tokens, so the sum over ranks is the gradient.

    Args:
        x: [B, T, C], this rank's shard.
        weight: [C, W], the last tap for the token itself.
        bias: [C] or None.

    Raises:
        LayoutError: x does not fit the layout, or weight and bias do not fit x.

    Source: Dao and Gu, arXiv 2405.21060.
    """
    fits = x.ndim == 3 and weight.ndim == 2 and len(weight) == x.shape[2] and weight.shape[1] > 0
    if not fits or (bias is not None and bias.shape != x.shape[2:]):
        raise LayoutError(
            f"the convolution needs x [B, T, C], weight [C, W], bias [C]; got {tuple(x.shape)}, "
            f"{tuple(weight.shape)}, {None if bias is None else tuple(bias.shape)}: of a "
            "torch.nn.Conv1d pass weight.squeeze(1)"
        )
    taps = weight.shape[1]
    rank = comm.group_rank(group)
    taps_left = taps - 1
    extended = _extended(x, taps_left, layout, rank, group, check)
    place = _position_ids(layout, rank, x.device)
    y = x.float() * weight[:, -1].float()
    for distance in range(1, taps):
        tap = weight[:, taps_left - distance].float()
        inside = (place >= distance)[None, :, None]
        y = y + torch.where(inside, extended[distance].float() * tap, 0.0)
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _extended(
    x: Tensor,
    width: int,
    layout: SequenceLayout,
    rank: int,
    group: ProcessGroup | None,
    check: bool,
) -> list[Tensor]:
    """By distance from 0 to width: x [B, T, C] as each token's neighbour so far left sees it."""
    if width == 0:
        return [x]
    halo = left_halo(x, width=width, layout=layout, group=group, check=check)
    shifted: list[list[Tensor]] = [[] for _ in range(width + 1)]
    spans = zip(layout.spans[rank], layout.local_offsets(rank), strict=True)
    for index, (span, offset) in enumerate(spans):
        whole = torch.cat([halo[:, index], x[:, offset : offset + span.num_tokens]], dim=1)
        for distance in range(width + 1):
            shifted[distance].append(whole[:, width - distance :][:, : span.num_tokens])
    return [torch.cat(parts, dim=1) if parts else x for parts in shifted]


@lru_cache(maxsize=64)
def _position_ids(layout: SequenceLayout, rank: int, device: torch.device) -> Tensor:
    """Copied to the device once for the layers that share a layout."""
    return layout.position_ids(rank).to(device)


# -- the exchange -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Tokens of one owner in the halo of one link."""

    owner: int
    owner_offset: int
    """Where they begin in the owner's local tensor."""
    taker: int
    span_index: int
    halo_offset: int
    """Where they begin in the halo of that span."""
    num_tokens: int


@lru_cache(maxsize=256)
def _pieces_of(layout: SequenceLayout, width: int, rank: int) -> tuple[list[_Piece], list[_Piece]]:
    """What a rank owns and what it takes of all that travels; kept for layers that are alike."""
    pieces = _pieces(layout, width)
    owned = [piece for piece in pieces if piece.owner == rank]
    return owned, [piece for piece in pieces if piece.taker == rank]


def _pieces(layout: SequenceLayout, width: int) -> list[_Piece]:
    """Everything that travels, in the order of the stream: the same list on every rank."""
    pieces = []
    for link in layout.chain:
        halo = layout.halo(link.span, width)
        for owner, part in layout.owners(halo) if halo.num_tokens else ():
            pieces.append(
                _Piece(
                    owner=owner,
                    owner_offset=layout.local_index(owner, part.start),
                    taker=link.rank,
                    span_index=link.span_index,
                    halo_offset=width - (link.span.start - part.start),
                    num_tokens=part.num_tokens,
                )
            )
    return pieces


def halo_steps(x: Tensor, width: int, layout: SequenceLayout, rank: int) -> Steps[Tensor]:
    """[B, spans, width, ...]: the halo of every span of this rank."""
    halo = x.new_zeros(x.shape[0], len(layout.spans[rank]), width, *x.shape[2:])
    owned, taken = _pieces_of(layout, width, rank)
    sends = [(piece.taker, _owned(x, piece).contiguous()) for piece in owned]
    recvs = [(piece.owner, x.new_empty(_shape(x, piece))) for piece in taken]
    if sends or recvs:
        yield Swap(sends, recvs)
    for piece, (_, tokens) in zip(taken, recvs, strict=True):
        _in_halo(halo, piece).copy_(tokens)
    return halo


def halo_grad_steps(
    dhalo: Tensor, tokens: int, width: int, layout: SequenceLayout, rank: int
) -> Steps[Tensor]:
    """[B, T, ...]: what the halos' gradients add to this rank's tokens, summed in float32."""
    shape = (dhalo.shape[0], tokens, *dhalo.shape[3:])
    wide = torch.promote_types(dhalo.dtype, torch.float32)
    dx = torch.zeros(shape, dtype=wide, device=dhalo.device)
    owned, taken = _pieces_of(layout, width, rank)
    sends = [(piece.owner, _in_halo(dhalo, piece).contiguous()) for piece in taken]
    recvs = [(piece.taker, dhalo.new_empty(_shape(dx, piece))) for piece in owned]
    if sends or recvs:
        yield Swap(sends, recvs)
    for piece, (_, grad) in zip(owned, recvs, strict=True):
        _owned(dx, piece).add_(grad)
    return dx.to(dhalo.dtype)


class _LeftHalo(torch.autograd.Function):
    """
    |          | in (local)                 | out (local)                | communication          |
    | forward  | x [B, T, ...]              | halo [B, spans, width, ...] | owners to takers      |
    | backward | dhalo                      | dx                         | takers back to owners  |

    Saves nothing.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, width: int, layout: SequenceLayout, group: ProcessGroup | None
    ) -> Tensor:
        ctx.what = (x.shape[1], width, layout, comm.group_rank(group))
        ctx.group, ctx.traffic = group, comm.current_traffic()
        return run_steps(halo_steps(x, width, layout, comm.group_rank(group)), group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dhalo: Tensor) -> tuple[Tensor, None, None, None]:
        with comm.count_into(ctx.traffic):
            dx = run_steps(halo_grad_steps(dhalo, *ctx.what), ctx.group)
        return dx, None, None, None


def _owned(x: Tensor, piece: _Piece) -> Tensor:
    return x[:, piece.owner_offset : piece.owner_offset + piece.num_tokens]


def _in_halo(halo: Tensor, piece: _Piece) -> Tensor:
    stop = piece.halo_offset + piece.num_tokens
    return halo[:, piece.span_index, piece.halo_offset : stop]


def _shape(x: Tensor, piece: _Piece) -> tuple[int, ...]:
    return (x.shape[0], piece.num_tokens, *x.shape[2:])


def _problem(
    x: Tensor, width: int, layout: SequenceLayout, group: ProcessGroup | None, rank: int
) -> str | None:
    if layout.world_size != comm.group_size(group):
        return (
            f"the layout is over {layout.world_size} ranks, but the group has "
            f"{comm.group_size(group)}: make the layout for the group it is used with"
        )
    tokens = layout.tokens_on(rank)
    if width < 1 or x.ndim < 2 or x.shape[1] != tokens:
        return (
            f"a halo needs width >= 1 and x [B, T, ...] with the {tokens} tokens that the layout "
            f"gives rank {rank}; got {width=}, {tuple(x.shape)}"
        )
    return None
