"""The mixer interface: layers that the package does not have, scattered by what they give."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.errors import LayoutError
from seqpar.layout import SequenceLayout
from seqpar.ops.state import scatter_mixer
from seqpar.ops.state_exchange import EXCHANGES
from seqpar.ops.state_job import StateJob
from seqpar.ops.state_local import RankPart
from seqpar.ops.state_mixer import AutogradMixer, Inputs, StateKind, Summary
from seqpar.ops.state_steps import backward_steps, forward_steps
from tests.ops.cases import BOUNDS, layouts
from tests.ranks import run_ranks
from tests.simulator import simulate
from tests.tolerances import assert_close

H, K, V = 2, 3, 4


@dataclass(frozen=True)
class GatedMixer(AutogradMixer):
    """Gated linear attention: a decay for every key dim (vector), or none (identity).

    S_t = diag(exp(g_t)) S_(t-1) + k_tᵀ v_t, o_t = q_t S_t, token by token.
    """

    gated: bool

    def kind(self, inputs: Inputs) -> StateKind:
        return StateKind((H, K, V), (H, V), transition_dims=2 if self.gated else None)

    def summarize(self, inputs: Inputs, cu_seqlens: Tensor | None) -> Summary:
        _, states, logs = self._run(inputs, None, cu_seqlens)
        return Summary(states, logs if self.gated else None)

    def output(
        self, inputs: Inputs, summary: Summary, entry: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        return self._run(inputs, entry, cu_seqlens)[0]

    def _run(
        self, inputs: Inputs, entry: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = inputs[:3]
        gate = inputs[3] if self.gated else torch.zeros_like(k)
        rows, tokens = q.shape[:2]
        bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
        outs, states, logs = [], [], []
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            state = q.new_zeros(rows, H, K, V)
            if entry is not None:
                state = entry if cu_seqlens is None else entry[index : index + 1]
            for t in range(start, stop):
                update = k[:, t, :, :, None] * v[:, t, :, None]
                state = gate[:, t].exp()[..., None] * state + update
                outs.append((q[:, t, :, :, None] * state).sum(-2))
            states.append(state)
            logs.append(gate[:, start:stop].sum(1))
        return torch.stack(outs, 1), torch.cat(states), torch.cat(logs)


@dataclass(frozen=True)
class MatrixMixer(GatedMixer):
    """The same without gates, by matrix products."""

    gated: bool = False

    def _run(
        self, inputs: Inputs, entry: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (x.transpose(1, 2) for x in inputs)
        bounds = [0, q.shape[2]] if cu_seqlens is None else cu_seqlens.tolist()
        outs, states = [], []
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            q_s, k_s, v_s = (x[:, :, start:stop] for x in (q, k, v))
            o = torch.matmul(torch.matmul(q_s, k_s.mT).tril(), v_s)
            outs.append(o if entry is None else o + torch.matmul(q_s, entry[index : index + 1]))
            states.append(torch.matmul(k_s.mT, v_s))
        return torch.cat(outs, 2).transpose(1, 2), torch.cat(states), torch.empty(0)


def _stream(n: int, gated: bool, batch: int) -> tuple[Tensor, ...]:
    shapes = [(batch, n, H, K), (batch, n, H, K), (batch, n, H, V)]
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    if gated:
        tensors.append(-torch.rand(batch, n, H, K, dtype=torch.float64))
    return tuple(tensors)


def _truth(
    mixer: GatedMixer, stream: tuple[Tensor, ...], do: Tensor, bounds: tuple[int, ...]
) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in stream]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    outs = [
        mixer._run(tuple(x[row : row + 1] for x in leaves), None, cu_seqlens)[0]
        for row in range(do.shape[0])
    ]
    o = torch.cat(outs)
    return (o.detach(), *torch.autograd.grad(o, leaves, do))


@pytest.mark.parametrize("gated", [True, False], ids=["vector", "identity"])
@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_a_foreign_mixer_is_scattered_exactly(exchange: str, gated: bool) -> None:
    mixer = GatedMixer(gated)
    for name, batch in (("one document", 2), ("packed", 1)):
        bounds = BOUNDS[name]
        stream = _stream(bounds[-1], gated, batch)
        do = torch.randn(batch, bounds[-1], H, V, dtype=torch.float64)
        expected = _truth(mixer, stream, do, bounds)
        for layout in layouts(bounds, 4).values():
            ranks = range(4)
            inputs = [tuple(layout.shard(x, r) for x in stream) for r in ranks]
            parts = [RankPart.of(mixer, layout, r, inputs[r]) for r in ranks]
            jobs = [StateJob(part, exchange, False) for part in parts]
            done = simulate([forward_steps(jobs[r], inputs[r], None) for r in ranks])
            back = simulate(
                [backward_steps(jobs[r], done[r].kept, layout.shard(do, r), None) for r in ranks]
            )
            found = [layout.unshard([done[r].o for r in ranks])]
            for index in range(len(stream)):
                found.append(layout.unshard([back[r][0][index] for r in ranks]))
            for x, ref in zip(found, expected, strict=True):
                assert_close(x, ref, what=f"{name}, {exchange}")


def _on_rank(rank: int, stream: tuple[Tensor, ...], do: Tensor) -> tuple[Tensor, ...]:
    layout = SequenceLayout.zigzag(BOUNDS["packed"], 2)
    leaves = [layout.shard(x, rank).requires_grad_() for x in stream]
    o, _ = scatter_mixer(GatedMixer(True), *leaves, layout=layout, group=dist.group.WORLD)
    with pytest.raises(LayoutError, match="does not compute heads apart"):
        scatter_mixer(
            GatedMixer(True),
            *leaves,
            layout=layout,
            group=dist.group.WORLD,
            exchange="all_to_all",
        )
    return (o.detach(), *torch.autograd.grad(o, leaves, layout.shard(do, rank)))


def test_a_foreign_mixer_over_a_process_group() -> None:
    bounds = BOUNDS["packed"]
    stream, do = _stream(bounds[-1], True, 1), torch.randn(1, bounds[-1], H, V).double()
    expected = _truth(GatedMixer(True), stream, do, bounds)
    parts = run_ranks(2, _on_rank, stream, do)
    layout = SequenceLayout.zigzag(bounds, 2)
    for found, ref in zip(zip(*parts, strict=True), expected, strict=True):
        assert_close(layout.unshard(list(found)), ref, what="foreign mixer")


def test_autocast_does_not_reach_a_foreign_mixer() -> None:
    """In forward it would, and in backward, which computes it again, it would not."""
    mixer, bounds = MatrixMixer(), BOUNDS["packed"]
    layout = SequenceLayout.contiguous(bounds, 1)
    stream, do = _stream(bounds[-1], False, 1), torch.randn(1, bounds[-1], H, V)
    found = []
    for enabled in (False, True):
        leaves = [x.float().requires_grad_() for x in stream]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o, _ = scatter_mixer(mixer, *leaves, layout=layout, group=None)
        found.append([o.detach(), *torch.autograd.grad(o, leaves, do)])
    assert all(torch.equal(x, ref) for x, ref in zip(*found, strict=True))
