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
STATE = (H, K, V)


@dataclass(frozen=True)
class GatedMixer(AutogradMixer):
    """Linear attention whose state decays by a gate: none (identity), one a head (scalar), one a
    key dim (vector) or one an element.

    S_t = exp(g_t) S_(t-1) + k_tᵀ v_t, o_t = q_t S_t, token by token.
    """

    dims: int | None

    def kind(self, inputs: Inputs) -> StateKind:
        return StateKind(STATE, (H, V), transition_dims=self.dims)

    def summarize(self, inputs: Inputs, cu_seqlens: Tensor | None) -> Summary:
        _, states, logs = self._run(inputs, None, cu_seqlens)
        return Summary(states, None if self.dims is None else logs)

    def output(
        self, inputs: Inputs, summary: Summary, entry: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        return self._run(inputs, entry, cu_seqlens)[0]

    def _run(
        self, inputs: Inputs, entry: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = inputs[:3]
        gate = k.new_zeros(k.shape[:3]) if self.dims is None else inputs[3]
        trailing = (1,) * (5 - gate.ndim)
        rows, tokens = q.shape[:2]
        bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
        outs, states, logs = [], [], []
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            state = q.new_zeros(rows, *STATE)
            if entry is not None:
                state = entry if cu_seqlens is None else entry[index : index + 1]
            for t in range(start, stop):
                update = k[:, t, :, :, None] * v[:, t, :, None]
                decay = gate[:, t].exp()
                state = decay.view(*decay.shape, *trailing) * state + update
                outs.append((q[:, t, :, :, None] * state).sum(-2))
            states.append(state)
            logs.append(gate[:, start:stop].sum(1))
        return torch.stack(outs, 1), torch.cat(states), torch.cat(logs)


@dataclass(frozen=True)
class MatrixMixer(GatedMixer):
    """The same without gates, by matrix products."""

    dims: int | None = None

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


@dataclass(frozen=True)
class Case:
    """A stream, what enters it, and weights that make a loss of outputs and final states."""

    bounds: tuple[int, ...]
    stream: tuple[Tensor, ...]
    initial: Tensor
    do: Tensor
    dfinals: Tensor


def _case(bounds: tuple[int, ...], dims: int | None, batch: int) -> Case:
    n, documents = bounds[-1], len(bounds) - 1

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, dtype=torch.float64)

    stream = [normal(n, H, K), normal(n, H, K), normal(n, H, V)]
    if dims is not None:
        stream.append(-normal(n, *STATE[:dims]).abs())
    return Case(bounds, tuple(stream), normal(*STATE), normal(n, H, V), normal(documents, *STATE))


def _truth(mixer: GatedMixer, case: Case) -> tuple[Tensor, ...]:
    """o, final states [B, D, *state], gradients of the inputs and of the initial state."""
    leaves = [x.clone().requires_grad_() for x in (*case.stream, case.initial)]
    *inputs, initial = leaves
    cu_seqlens = torch.tensor(case.bounds, dtype=torch.int32)
    outs, finals = [], []
    for row in range(case.do.shape[0]):
        entry = torch.cat([initial[row : row + 1], torch.zeros(len(case.bounds) - 2, *STATE)])
        o, states, _ = mixer._run(tuple(x[row : row + 1] for x in inputs), entry, cu_seqlens)
        outs.append(o)
        finals.append(states[None])
    o, states = torch.cat(outs), torch.cat(finals)
    grads = torch.autograd.grad([o, states], leaves, [case.do, case.dfinals])
    return (o.detach(), states.detach(), *grads)


@pytest.mark.parametrize("dims", [None, 1, 2, 3], ids=["identity", "scalar", "vector", "element"])
@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_a_foreign_mixer_is_scattered_exactly(exchange: str, dims: int | None) -> None:
    mixer, ranks = GatedMixer(dims), range(4)
    for name, batch in (("one document", 2), ("packed", 1)):
        case = _case(BOUNDS[name], dims, batch)
        expected = _truth(mixer, case)
        for layout in layouts(case.bounds, 4).values():
            inputs = [tuple(layout.shard(x, r) for x in case.stream) for r in ranks]
            parts = [RankPart.of(mixer, layout, r, inputs[r]) for r in ranks]
            jobs = [StateJob(part, exchange, True) for part in parts]
            done = simulate([forward_steps(jobs[r], inputs[r], case.initial) for r in ranks])
            dos = [layout.shard(case.do, r) for r in ranks]
            given = [case.dfinals * (r == 3) for r in ranks]
            back = simulate(
                [backward_steps(jobs[r], done[r].kept, dos[r], given[r]) for r in ranks]
            )
            found = [layout.unshard([item.o for item in done]), done[0].final_states]
            for index in range(len(case.stream)):
                found.append(layout.unshard([grads[index] for grads, _ in back]))
            found.append(sum(grad for _, grad in back if grad is not None))
            for x, ref in zip(found, expected, strict=True):
                assert_close(x, ref, what=f"{name}, {exchange}")


def _on_rank(rank: int, case: Case) -> tuple[Tensor, ...]:
    layout = SequenceLayout.zigzag(case.bounds, 2)
    leaves = [layout.shard(x, rank).requires_grad_() for x in case.stream]
    initial = case.initial.clone().requires_grad_()
    how = {"layout": layout, "group": dist.group.WORLD, "initial_state": initial}
    o, finals = scatter_mixer(GatedMixer(2), *leaves, **how, return_final_state=True)
    with pytest.raises(LayoutError, match="does not compute heads apart"):
        scatter_mixer(GatedMixer(2), *leaves, **how, exchange="all_to_all")
    given = [layout.shard(case.do, rank), case.dfinals.flatten(0, 1) / 2]
    grads = torch.autograd.grad([o, finals], [*leaves, initial], given)
    return (o.detach(), finals.detach(), *grads)


def test_a_foreign_mixer_over_a_process_group() -> None:
    case = _case(BOUNDS["packed"], 2, 1)
    o, finals, *grads, dinitial = _truth(GatedMixer(2), case)
    parts = run_ranks(2, _on_rank, case)
    layout = SequenceLayout.zigzag(case.bounds, 2)
    outs, states, *found, initials = zip(*parts, strict=True)
    for x, ref in zip((outs, *found), (o, *grads), strict=True):
        assert_close(layout.unshard(list(x)), ref, what="foreign mixer")
    assert_close(states[1], finals[0], what="final states", dim=0)
    assert_close(initials[0] + initials[1], dinitial, what="initial state")


def test_autocast_does_not_reach_a_foreign_mixer() -> None:
    """In forward it would, and in backward, which computes it again, it would not."""
    mixer, case = MatrixMixer(), _case(BOUNDS["packed"], None, 1)
    layout = SequenceLayout.contiguous(case.bounds, 1)
    found = []
    for enabled in (False, True):
        leaves = [x.float().requires_grad_() for x in case.stream]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            o, _ = scatter_mixer(mixer, *leaves, layout=layout, group=None)
        found.append([o.detach(), *torch.autograd.grad(o, leaves, case.do.float())])
    assert all(torch.equal(x, ref) for x, ref in zip(*found, strict=True))
