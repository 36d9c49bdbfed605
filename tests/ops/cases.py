"""Streams, layouts and decays that state operators are tested on, and their one-device truth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.kernels.lightning.inputs import state_dtype
from seqpar.kernels.lightning.reference import quadratic_attention
from seqpar.layout import SequenceLayout, Span

HEADS, KEY_DIM, VALUE_DIM = 3, 4, 5
BOUNDS = {
    "one document": (0, 41),
    "packed": (0, 7, 8, 9, 30, 44),
    "documents of one token": (0, 1, 2, 3, 4, 5, 23),
    "fewer tokens than ranks": (0, 2, 3),
}
DECAYS = ("none", "fixed", "per token")


def layouts(bounds: tuple[int, ...], world_size: int) -> dict[str, SequenceLayout]:
    """Every kind of layout of a stream over so many ranks."""
    found = {
        "contiguous": SequenceLayout.contiguous(bounds, world_size),
        "zigzag": SequenceLayout.zigzag(bounds, world_size),
    }
    n = bounds[-1]
    if world_size >= 3:
        cut = max(1, n // 3)
        spans: list[tuple[Span, ...]] = [() for _ in range(world_size)]
        # Rank 0 holds nothing, the last rank comes first, and the second holds two far parts.
        spans[-1] = (Span(0, 1),)
        spans[1] = (Span(1, cut), Span(n - cut, n)) if n > 3 else (Span(1, n),)
        spans[2] = (*spans[2], Span(cut, n - cut)) if n > 3 else spans[2]
        if world_size == 3 and n > 3:
            spans[2] = (Span(0, 1), Span(cut, n - cut))
        found["uneven, with an empty rank"] = SequenceLayout(bounds, tuple(spans))
    return found


@dataclass(frozen=True)
class Stream:
    """The whole stream's tensors, float64 or lower; `weights` make a scalar loss of the results."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial: Tensor | None
    do: Tensor
    dfinals: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        per_token = self.log_decay is not None and self.log_decay.ndim == 3
        return (self.q, self.k, self.v, *((self.log_decay,) if per_token else ()))


def make_stream(
    bounds: tuple[int, ...],
    decay: str,
    *,
    batch: int = 1,
    initial: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Stream:
    """A random stream; fixed decays range from none to one that forgets in a few tokens."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    n, documents, states = bounds[-1], len(bounds) - 1, state_dtype(dtype)
    log_decay = None
    if decay == "fixed":
        log_decay = torch.tensor([0.0, -0.05, -1.5], dtype=torch.float32)
    elif decay == "per token":
        log_decay = -normal(batch, n, HEADS).abs() * 0.3
    return Stream(
        q=normal(batch, n, HEADS, KEY_DIM),
        k=normal(batch, n, HEADS, KEY_DIM),
        v=normal(batch, n, HEADS, VALUE_DIM),
        log_decay=log_decay,
        initial=normal(batch, HEADS, KEY_DIM, VALUE_DIM, dtype=states) if initial else None,
        do=normal(batch, n, HEADS, VALUE_DIM),
        dfinals=normal(batch * documents, HEADS, KEY_DIM, VALUE_DIM, dtype=states),
    )


@dataclass(frozen=True)
class Truth:
    """One device, float64: results and gradients of sum(o * do) + sum(finals * dfinals)."""

    o: Tensor
    finals: Tensor | None
    """None: not asked for."""
    grads: tuple[Tensor, ...]
    dinitial: Tensor | None


def truth(stream: Stream, bounds: tuple[int, ...]) -> Truth:
    """Every row by the quadratic form, with autograd's gradients."""
    leaves = [x.double().requires_grad_() for x in stream.tensors]
    per_token = len(leaves) == 4
    initial = None if stream.initial is None else stream.initial.double().requires_grad_()
    outs, finals = [], []
    for row in range(stream.q.shape[0]):
        q, k, v = (x[row : row + 1] for x in leaves[:3])
        log_decay = leaves[3][row : row + 1] if per_token else stream.log_decay
        states = q.new_zeros(len(bounds) - 1, HEADS, KEY_DIM, VALUE_DIM)
        if initial is not None:
            states = torch.cat([initial[row : row + 1], states[1:]])
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        o, final = quadratic_attention(
            q, k, v, log_decay=log_decay, cu_seqlens=cu_seqlens, initial_state=states
        )
        outs.append(o)
        finals.append(final)
    o, final = torch.cat(outs), torch.cat(finals)
    loss = (o * stream.do.double()).sum() + (final * stream.dfinals.double()).sum()
    wanted = leaves if initial is None else [*leaves, initial]
    grads = torch.autograd.grad(loss, wanted)
    count = len(leaves)
    return Truth(
        o.detach(), final.detach(), grads[:count], grads[count] if initial is not None else None
    )
