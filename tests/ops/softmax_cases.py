"""Cases of sequence-parallel softmax attention: stream tensors, layouts, and the comparison."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.layout import SequenceLayout, Span
from seqpar.ops import ring_late
from seqpar.ops.softmax import softmax_attention
from seqpar.ops.softmax_choice import FLOPS_PER_S
from tests.ops.softmax_reference import reference, visible
from tests.tolerances import assert_close

NAMES = ("out", "dq", "dk", "dv")


@dataclass(frozen=True)
class Case:
    """One call of softmax_attention, whole-stream view.

    `late`: the ring's own blocks are worked on in two parts, the last message between them.
    """

    layout: SequenceLayout
    strategy: str = "ring"
    heads: int = 4
    kv_heads: int = 2
    key_dim: int = 8
    value_dim: int = 8
    batch: int = 1
    causal: bool = True
    window: int | None = None
    key_layout: SequenceLayout | None = None
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    late: bool = False

    def __str__(self) -> str:
        spans = "|".join(str(self.layout.tokens_on(r)) for r in range(self.layout.world_size))
        mask = f"{'causal' if self.causal else 'both'} window={self.window}"
        heads = f"H{self.heads}G{self.kv_heads}K{self.key_dim}V{self.value_dim}B{self.batch}"
        docs = self.layout.num_documents
        late = " late" * self.late
        return f"{self.strategy}{late} {heads} {mask} docs={docs} tokens={spans} {self.options}"

    def streams(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, dout of the whole stream, the same on every rank."""
        generator = torch.Generator().manual_seed(seed)
        keys = (self.key_layout or self.layout).num_tokens
        shapes = (
            (self.layout.num_tokens, self.heads, self.key_dim),
            (keys, self.kv_heads, self.key_dim),
            (keys, self.kv_heads, self.value_dim),
            (self.layout.num_tokens, self.heads, self.value_dim),
        )
        draws = (
            torch.randn(self.batch, *s, generator=generator, dtype=torch.float64) for s in shapes
        )
        q, k, v, dout = (x.to(self.dtype) for x in draws)
        return q, k, v, dout


@contextmanager
def device_of(case: Case) -> Iterator[None]:
    """If the case is late, as on a device so slow that every own block is long."""
    with mock.patch.object(ring_late, "FLOPS_PER_S", 1.0 if case.late else FLOPS_PER_S):
        yield


def run_case(rank: int, case: Case, seed: int = 0) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of this rank."""
    world = case.layout.world_size
    group = dist.group.WORLD if world > 1 else None
    key_layout = case.key_layout or case.layout
    q, k, v, dout = case.streams(seed)
    q, dout = (case.layout.shard(x, rank) for x in (q, dout))
    k, v = (key_layout.shard(x, rank) for x in (k, v))
    for x in (q, k, v):
        x.requires_grad_()
    with device_of(case):
        out = softmax_attention(
            q,
            k,
            v,
            layout=case.layout,
            group=group,
            strategy=case.strategy,
            causal=case.causal,
            window=case.window,
            key_layout=case.key_layout,
            **case.options,
        )
        grads = torch.autograd.grad(out, (q, k, v), dout)
    assert out.dtype == case.dtype
    return (out.detach(), *grads)


def run_cases(rank: int, cases: list[Case]) -> list[tuple[Tensor, ...]]:
    """Several cases in one group: starting a group costs more than a case."""
    return [run_case(rank, case) for case in cases]


def assert_exact(case: Case, shards: list[tuple[Tensor, ...]]) -> None:
    """Compare what the ranks hold with the whole stream in float64, per token."""
    sees = visible(
        case.layout.cu_seqlens,
        causal=case.causal,
        window=case.window,
        key_cu_seqlens=case.key_layout.cu_seqlens if case.key_layout else None,
    )
    scale = case.options.get("scale", case.key_dim**-0.5)
    expected = reference(*case.streams(), sees, scale)
    layouts = (case.layout, case.layout, *[case.key_layout or case.layout] * 2)
    for i, (name, layout, ref) in enumerate(zip(NAMES, layouts, expected, strict=True)):
        whole = layout.unshard([shard[i] for shard in shards])
        assert_close(whole, ref, what=f"{name} of {case}", dtype=case.dtype)


def layouts(bounds: tuple[int, ...], world_size: int) -> list[SequenceLayout]:
    """Contiguous, zigzag, uneven with an empty rank, and single tokens dealt out in turn."""
    n = bounds[-1]
    made = [
        SequenceLayout.contiguous(bounds, world_size),
        SequenceLayout.zigzag(bounds, world_size),
    ]
    if world_size > 1:
        cuts = [0, *(n * i * i // (world_size - 1) ** 2 for i in range(1, world_size))]
        cuts = sorted([*cuts, n])[: world_size + 1]
        made.append(SequenceLayout(bounds, tuple(((a, b),) for a, b in itertools.pairwise(cuts))))
        dealt = [[Span(i, i + 1) for i in range(r, n, world_size)] for r in range(world_size)]
        if n <= 64:
            made.append(SequenceLayout(bounds, tuple(tuple(spans) for spans in dealt)))
    return made
