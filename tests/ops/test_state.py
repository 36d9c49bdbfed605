"""State operators against one device: every exchange, decay, layout and number of ranks."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from seqpar import comm
from seqpar.layout import SequenceLayout, Span
from seqpar.mesh import GroupPool
from seqpar.ops.state import state_attention
from seqpar.ops.state_exchange import EXCHANGES
from seqpar.ops.state_job import StateJob
from seqpar.ops.state_lightning import LightningMixer, fixed_on_host
from seqpar.ops.state_local import RankPart
from seqpar.ops.state_steps import backward_steps, forward_steps
from tests.ops.cases import BOUNDS, DECAYS, Stream, Truth, layouts, make_stream, truth
from tests.ops.state_simulated import check, simulated
from tests.ranks import run_ranks
from tests.simulator import simulate
from tests.tolerances import assert_close

NAMES = [*sorted(EXCHANGES), "all_to_all"]


def _lean(
    stream: Stream, layout: SequenceLayout, on_host: tuple[float, ...] | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """o and the gradients where no state goes in or out; what has decayed on the host is cut."""
    mixer, ranks = LightningMixer(stream.log_decay, on_host=on_host), range(layout.world_size)
    inputs = [tuple(layout.shard(x, rank) for x in stream.tensors) for rank in ranks]
    cut = on_host is not None
    parts = [RankPart.of(mixer, layout, r, inputs[r], overlap=False, whole=cut) for r in ranks]
    late = layout.world_size % 2 == 0
    jobs = [StateJob(part, "all_gather", False, takes_late=late) for part in parts]
    assert all(job.is_lean == (len(layout.runs(r)) == 1) for r, job in enumerate(jobs))
    done = simulate([forward_steps(jobs[r], inputs[r], None) for r in ranks])
    backward = [
        backward_steps(
            jobs[r], done[r].kept, layout.shard(stream.do, r), None, wants_initial_grad=False
        )
        for r in ranks
    ]
    grads = [grads for grads, _ in simulate(backward)]
    whole = tuple(layout.unshard(list(parts)) for parts in zip(*grads, strict=True))
    return layout.unshard([item.o for item in done]), whole


@pytest.mark.parametrize("decay", ["none", "fixed"])
@pytest.mark.parametrize("bounds", [(0, 41), (0, 11, 41), (0, 3, 41), (0, 10, 20, 41)])
def test_a_rank_with_one_run_goes_straight_through(bounds: tuple[int, ...], decay: str) -> None:
    stream = make_stream(bounds, decay, batch=2)
    stream = replace(stream, dfinals=torch.zeros_like(stream.dfinals))
    expected = truth(stream, bounds)
    for world_size in range(1, 9):
        o, grads = _lean(stream, SequenceLayout.contiguous(bounds, world_size))
        check(Truth(o, expected.finals, grads, None), expected, f"W={world_size}")


@pytest.mark.parametrize("exchange", NAMES)
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", BOUNDS)
def test_every_layout_gives_the_one_device_result(name: str, decay: str, exchange: str) -> None:
    bounds = BOUNDS[name]
    for batch, initial in ((1, False), (2, True)):
        stream = make_stream(bounds, decay, batch=batch, initial=initial)
        expected = truth(stream, bounds)
        for world_size in range(1, 9) if exchange == "all_gather" else (2, 3, 5, 8):
            for kind, layout in layouts(bounds, world_size).items():
                found = simulated(stream, layout, exchange)
                check(found, expected, f"{name}, {decay}, {kind}, W={world_size}, B={batch}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("exchange", NAMES)
def test_states_of_half_precision_tokens_are_float32(exchange: str, dtype: torch.dtype) -> None:
    bounds = BOUNDS["packed"]
    stream = make_stream(bounds, "fixed", dtype=dtype)
    expected = truth(stream, bounds)
    for layout in layouts(bounds, 4).values():
        found = simulated(stream, layout, exchange)
        assert found.o.dtype == dtype
        assert found.finals is not None
        assert expected.finals is not None
        assert_close(found.finals, expected.finals, what="finals", dtype=torch.float32, dim=0)
        check(found, expected, f"{exchange}, {dtype}", dtype)


LONG = (0, 230, 231, 400)


@pytest.mark.parametrize("exchange", NAMES)
@pytest.mark.parametrize(
    "decay",
    [
        pytest.param((-4.0, -5.0, -6.0), id="every head forgets: added later"),
        pytest.param((-0.08, -3.0, -6.0), id="one head reaches on"),
        pytest.param((-6.0, 0.0, -9.0), id="the middle head never forgets"),
        pytest.param((-torch.inf, -0.08, -6.0), id="one head sees each token alone"),
        pytest.param((-torch.inf, -6.0, -torch.inf), id="added later, two heads alone"),
    ],
)
def test_what_has_decayed_is_left_out_exactly(decay: tuple[float, ...], exchange: str) -> None:
    stream = make_stream(LONG, "none", batch=2, initial=True, dtype=torch.float32)
    stream = replace(stream, log_decay=torch.tensor(decay))
    expected = truth(stream, LONG)
    for world_size in (2, 3, 7):
        for kind, layout in layouts(LONG, world_size).items():
            mixer = LightningMixer(stream.log_decay, on_host=fixed_on_host(stream.log_decay))
            plan = RankPart.of(mixer, layout, 1, stream.tensors).plan
            assert plan.adds_later == (max(decay) < -1)
            with comm.count_traffic() as traffic:
                found = simulated(stream, layout, exchange, truncate=True)
            check(found, expected, f"{decay}, {kind}, W={world_size}")
            if world_size == 7 and exchange in ("all_gather", "log_step"):
                assert traffic[exchange].saved_bytes > 0


@pytest.mark.parametrize("exchange", NAMES)
def test_a_head_that_outlives_one_link_and_not_the_next_is_sent_on(exchange: str) -> None:
    bounds, rank_of = (0, 300), (0, 1, 2, 0, 1)
    spans: list[list[Span]] = [[], [], []]
    for rank, cut in zip(rank_of, itertools.pairwise((0, 97, 100, 200, 204, 300)), strict=True):
        spans[rank].append(Span(*cut))
    layout = SequenceLayout(bounds, tuple(map(tuple, spans)))
    stream = make_stream(bounds, "none", dtype=torch.float32)
    stream = replace(stream, log_decay=torch.tensor([-0.2, -0.5, -6.0]))
    expected = truth(stream, bounds)
    for whole in (False, True) if exchange == "all_gather" else (False,):
        check(simulated(stream, layout, exchange, truncate=True, whole=whole), expected, exchange)


def test_a_rank_whose_state_nobody_takes_does_not_make_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backward it begins with what needs no other rank; those that give, give first."""
    done: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        call = getattr(LightningMixer, name)

        def noting(self: LightningMixer, *args: Any) -> Any:
            done.append(name)
            return call(self, *args)

        return noting

    for name in ("summarize", "summarize_grad", "begin_backward"):
        monkeypatch.setattr(LightningMixer, name, noted(name))
    bounds = (0, 41)
    _lean(make_stream(bounds, "fixed"), SequenceLayout.contiguous(bounds, 4))
    assert done == ["summarize"] * 3 + ["begin_backward"] + ["summarize_grad"] * 3


@pytest.mark.parametrize(
    ("decay", "hops"), [((-4.0, -5.0, -6.0), 1), ((-0.09, -3.0, -6.0), 4), ((-6.0, 0.0, -9.0), 6)]
)
def test_whole_states_come_from_where_a_head_still_matters(
    decay: tuple[float, ...], hops: int
) -> None:
    """As over memory that peers read: the simulator makes NaN of what is none of the sources."""
    stream = make_stream(LONG, "none", batch=2, initial=True, dtype=torch.float32)
    stream = replace(stream, log_decay=torch.tensor(decay))
    expected = truth(stream, LONG)
    for world_size in (2, 3, 7):
        for kind, layout in layouts(LONG, world_size).items():
            found = simulated(stream, layout, "all_gather", truncate=True, whole=True)
            check(found, expected, f"{decay}, {kind}, W={world_size}")
    one = (0, 7 * 60)
    stream = make_stream(one, "none", dtype=torch.float32)
    stream = replace(
        stream, log_decay=torch.tensor(decay), dfinals=torch.zeros_like(stream.dfinals)
    )
    expected, layout = truth(stream, one), SequenceLayout.contiguous(one, 7)
    o, grads = _lean(stream, layout, decay)
    check(Truth(o, expected.finals, grads, None), expected, f"{decay}: straight through")
    mixer = LightningMixer(stream.log_decay, on_host=decay)
    plan = RankPart.of(mixer, layout, 6, stream.tensors, whole=True).plan.forward_scan
    assert plan.sources == tuple(range(6 - hops, 6))
    assert plan.saved_messages == 6 - hops


def _on_ranks(rank: int, cases: list[Any]) -> dict[str, Any]:
    pool = GroupPool()
    pool.prepare([tuple(range(w)) for w in range(1, dist.get_world_size() + 1)])
    results = {}
    for label, stream, layout, exchange in cases:
        if rank < layout.world_size:
            group = pool.group(range(layout.world_size)) if layout.world_size > 1 else None
            results[label] = _attention_on_rank(rank, stream, layout, exchange, group)
    pool.close()
    return results


def _attention_on_rank(
    rank: int, stream: Stream, layout: SequenceLayout, exchange: str, group: Any
) -> tuple[Tensor, ...]:
    leaves = [layout.shard(x, rank).requires_grad_() for x in stream.tensors]
    log_decay = leaves[3] if len(leaves) == 4 else stream.log_decay
    initial = None if stream.initial is None else stream.initial.clone().requires_grad_()
    q, k, v = leaves[:3]
    o, finals = state_attention(
        q,
        k,
        v,
        log_decay=log_decay,
        layout=layout,
        group=group,
        initial_state=initial,
        return_final_state=True,
        exchange=exchange,
    )
    loss = (o * layout.shard(stream.do, rank)).sum()
    loss = loss + (finals * stream.dfinals).sum() / layout.world_size
    wanted = leaves if initial is None else [*leaves, initial]
    grads = torch.autograd.grad(loss, wanted)
    return (o.detach(), finals.detach(), *grads)


def test_process_groups_of_1_to_8_ranks_give_the_one_device_result() -> None:
    cases, expected = [], {}
    for index, world_size in enumerate(range(1, 9)):
        bounds = BOUNDS[("one document", "packed")[index % 2]]
        for kind, layout in layouts(bounds, world_size).items():
            decay = DECAYS[len(cases) % 3]
            batch, initial = (2, True) if len(cases) % 2 else (1, False)
            stream = make_stream(bounds, decay, batch=batch, initial=initial, dtype=torch.float32)
            for exchange in NAMES:
                label = f"W={world_size}, {kind}, {decay}, {exchange}"
                cases.append((label, stream, layout, exchange))
                expected[label] = (stream, layout, truth(stream, bounds))
    results = run_ranks(8, _on_ranks, cases)
    for label, (stream, layout, ref) in expected.items():
        parts = [results[rank][label] for rank in range(layout.world_size)]
        grads = tuple(
            layout.unshard([part[2 + index] for part in parts])
            for index in range(len(stream.tensors))
        )
        dinitial = None
        if stream.initial is not None:
            dinitial = torch.stack([part[-1] for part in parts]).sum(0)
        o = layout.unshard([part[0] for part in parts])
        check(Truth(o, parts[0][1], grads, dinitial), ref, label)
