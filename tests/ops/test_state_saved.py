"""What the state operator keeps for backward: where autograd sees it, and nowhere else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from seqpar.layout import SequenceLayout
from seqpar.ops import state_lightning
from seqpar.ops.state import state_attention
from seqpar.ops.state_call import call_plan
from seqpar.ops.state_exchange import EXCHANGES
from seqpar.ops.state_job import StateJob
from seqpar.ops.state_lightning import LightningMixer
from seqpar.ops.state_local import RankPart
from seqpar.ops.state_mixer import Inputs, Summary
from seqpar.ops.state_saved import put_tensors, take_tensors
from seqpar.ops.state_steps import forward_steps
from seqpar.ranks import run_on_ranks
from tests.ops.state_recomputed import Recomputed
from tests.simulator import simulate

LAYOUT = SequenceLayout.contiguous((0, 5, 64), 1)


@dataclass(frozen=True)
class _Inner:
    x: Tensor | None
    table: Tensor
    name: str


@dataclass(frozen=True)
class _Outer:
    first: Tensor
    inner: _Inner | None


def test_tensors_are_taken_out_of_dataclasses_and_put_back() -> None:
    table = torch.arange(3)
    value = _Outer(torch.ones(2), _Inner(torch.zeros(1), table, "name"))
    found: list[Tensor] = [torch.randn(7)]
    emptied = take_tensors(value, found)
    assert [x.numel() for x in found] == [7, 2, 1]
    assert take_tensors(value, found) == emptied, "what is there already is not taken again"
    assert not isinstance(emptied.first, Tensor)
    assert emptied.inner.table is table
    again = put_tensors(emptied, tuple(x + 1 for x in found))
    assert torch.equal(again.first, torch.full((2,), 2.0))
    assert torch.equal(again.inner.x, torch.ones(1))
    assert again.inner.name == "name"
    nothing = _Outer(torch.ones(2), None)
    found = []
    emptied = take_tensors(nothing, found)
    assert put_tensors(emptied, tuple(found)) == nothing


def test_checkpointing_frees_the_states(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[StorageWeakRef] = []
    summarize = LightningMixer.summarize

    def watched(self: LightningMixer, inputs: Inputs, cu_seqlens: Tensor | None) -> Summary:
        summary = summarize(self, inputs, cu_seqlens)
        made.append(StorageWeakRef(summary.state.untyped_storage()))
        return summary

    monkeypatch.setattr(LightningMixer, "summarize", watched)
    leaves = [torch.randn(1, 64, 3, 7, requires_grad=True) for _ in range(3)]
    log_decay = torch.tensor([-0.1, -0.2, -0.3])

    def layer(*tensors: Tensor) -> Tensor:
        q, k, v = tensors
        return state_attention(q, k, v, log_decay=log_decay, layout=LAYOUT, group=None)[0]

    o = checkpoint(layer, *leaves, use_reentrant=False)
    plain = layer(*leaves)
    assert [ref.expired() for ref in made] == [True, False]
    do = torch.randn_like(o)
    found = torch.autograd.grad(o, leaves, do)
    expected = torch.autograd.grad(plain, leaves, do)
    assert all(torch.equal(x, ref) for x, ref in zip(found, expected, strict=True))


@pytest.mark.parametrize("exchange", sorted(EXCHANGES))
def test_a_state_that_entered_does_not_hold_those_that_did_not(exchange: str) -> None:
    """Kept until backward, a view would keep every rank's states."""
    layout, ranks = SequenceLayout.contiguous((0, 64), 4), range(4)
    tokens = [torch.randn(1, 16, 3, 7) for _ in range(3)]
    parts = [RankPart.of(LightningMixer(), layout, rank, tuple(tokens)) for rank in ranks]
    jobs = [StateJob(part, exchange, False) for part in parts]
    done = simulate([forward_steps(job, tuple(tokens), None) for job in jobs])
    for rank in ranks:
        entries = done[rank].kept.entries.values()
        assert len(entries) == (rank > 0)
        for entry in entries:
            assert entry.untyped_storage().nbytes() == entry.nbytes


def _recomputed(rank: int) -> bool:
    assert dist.group.WORLD is not None
    Recomputed(dist.group.WORLD, "cpu", (96, 2, 16), decays=True).check()
    return True


def test_recomputed_layers_on_two_ranks() -> None:
    """Where nothing is recorded; state_on_gpus.py runs the same where calls are."""
    assert all(run_on_ranks(_recomputed, ranks=2, device="cpu", timeout_s=60.0))


def _calls(layout: SequenceLayout, **options: Any) -> int:
    """How many plans one more call makes."""
    q, k, v = (torch.randn(1, layout.num_tokens, 2, 4) for _ in range(3))
    made = call_plan.cache_info().misses
    state_attention(q, k, v, layout=layout, group=None, **options)
    return call_plan.cache_info().misses - made


def test_a_call_that_is_alike_makes_no_new_plan() -> None:
    call_plan.cache_clear()
    decay = torch.tensor([-0.1, -0.2])
    assert _calls(LAYOUT, log_decay=decay) == 1
    assert _calls(LAYOUT, log_decay=decay) == 0
    assert _calls(SequenceLayout.contiguous((0, 5, 64), 1), log_decay=decay) == 0
    assert _calls(LAYOUT, log_decay=2 * decay) == 1
    assert _calls(LAYOUT, log_decay=None) == 1
    assert _calls(SequenceLayout.contiguous((0, 6, 64), 1), log_decay=None) == 1


def test_a_decay_is_read_once_for_each_version(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[Tensor] = []
    floats = state_lightning._floats
    monkeypatch.setattr(state_lightning, "_floats", lambda x: reads.append(x) or floats(x))
    decay = torch.tensor([-0.25, -200.0])
    for _ in range(2):
        assert state_lightning.fixed_on_host(decay) == (-0.25, -100.0)
    decay.mul_(2)
    for _ in range(2):
        assert state_lightning.fixed_on_host(decay) == (-0.5, -100.0)
    assert len(reads) == 2
