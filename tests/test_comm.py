"""Collectives: what arrives, in every dtype, with empty parts; counted bytes; refusals alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from seqpar import comm
from seqpar.errors import LayoutError, MeshError
from seqpar.kernels.recorder import Recorder
from tests.ranks import run_ranks

W = 3
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool)


def _mine(rank: int, dtype: torch.dtype, n: int = 2) -> torch.Tensor:
    return (torch.arange(n * 3).view(n, 3) + 100 * rank).to(dtype)


def _gathers(rank: int) -> None:
    group = dist.group.WORLD
    for dtype in DTYPES:
        out = comm.all_gather(_mine(rank, dtype), group)
        assert torch.equal(out, torch.stack([_mine(r, dtype) for r in range(W)]))
    transposed = _mine(rank, torch.float32).T
    pending = comm.all_gather_async(transposed, group)
    assert torch.equal(pending.wait()[1], _mine(1, torch.float32).T)
    assert pending.wait() is pending.wait()
    assert comm.all_gather(torch.zeros(0, 4), group).shape == (W, 0, 4)


def test_all_gather_gives_every_rank_in_order() -> None:
    run_ranks(W, _gathers)


def _single_elements(rank: int) -> None:
    """Contiguous by their size alone: a stride of 1 is not what they have."""
    one = torch.full((1, 4), float(rank))[:, 3:].T
    assert one.is_contiguous()
    assert one.view(-1).stride() != (1,)
    gathered = comm.all_gather(one, dist.group.WORLD)
    assert gathered.flatten().tolist() == [0.0, 1.0, 2.0]
    right, left = (rank + 1) % W, (rank - 1) % W
    arrived = comm.exchange([(right, one)], [(left, torch.empty(1))], dist.group.WORLD).wait()
    assert arrived[0].item() == left


def test_single_elements_of_any_stride_travel() -> None:
    run_ranks(W, _single_elements)


def _all_to_all(rank: int) -> None:
    group = dist.group.WORLD
    for dtype in DTYPES:
        sends = [_mine(10 * rank + to, dtype, n=(rank + to) % W) for to in range(W)]
        shapes = [((frm + rank) % W, 3) for frm in range(W)]
        received = comm.all_to_all(sends, shapes, group)
        for frm in range(W):
            expected = _mine(10 * frm + rank, dtype, n=(frm + rank) % W)
            assert torch.equal(received[frm], expected)


def _swaps_again(rank: int) -> None:
    """What a recorder has written down moves other tensors later."""
    group = dist.group.WORLD
    right, left = (rank + 1) % W, (rank - 1) % W
    with Recorder([]) as recorder, comm.count_traffic() as traffic:
        sent, received = torch.empty(6), torch.empty(2, 3)
        recorder.do(lambda x: x.fill_(rank), sent)
        comm.swap([(right, sent.view(2, 3))], [(left, received)], group)
    assert recorder.problem is None
    assert torch.equal(received, torch.full((2, 3), float(left)))
    assert traffic["exchange"].received_bytes == traffic["exchange"].sent_bytes == 24
    assert [place.number for place in recorder.steps[1].places] == [0, 1]
    other, landing = torch.full((6,), 10.0 + rank), torch.empty(6)
    recorder.steps[1].action(other.view(torch.uint8), landing.view(torch.uint8))
    assert torch.equal(landing, torch.full((6,), 10.0 + left))
    comm.swap([], [], group)


def test_recorded_messages_are_repeated() -> None:
    run_ranks(W, _swaps_again)


def test_all_to_all_takes_uneven_and_empty_parts() -> None:
    run_ranks(W, _all_to_all)


def _exchange(rank: int) -> None:
    group = dist.group.WORLD
    right, left = (rank + 1) % W, (rank - 1) % W
    sends = [(right, _mine(rank, torch.bfloat16)), (right, _mine(rank + 50, torch.bfloat16, n=1))]
    sends += [(rank, torch.full((2,), 7.0)), (left, torch.empty(0))]
    recvs = [(left, torch.empty(2, 3, dtype=torch.bfloat16))]
    recvs += [(left, torch.empty(1, 3, dtype=torch.bfloat16)), (rank, torch.empty(2))]
    recvs += [(right, torch.empty(0))]
    first, second, own, empty = comm.exchange(sends, recvs, group).wait()
    assert torch.equal(first, _mine(left, torch.bfloat16))
    assert torch.equal(second, _mine(left + 50, torch.bfloat16, n=1))
    assert own.tolist() == [7.0, 7.0]
    assert not empty.numel()
    # One pair talks, the third rank does nothing and must not be waited for.
    if rank == 0:
        comm.exchange([(2, torch.ones(3))], [], group).wait()
    if rank == 2:
        assert comm.exchange([], [(0, torch.empty(3))], group).wait()[0].sum() == 3
    assert comm.exchange([], [], group).wait() == []


def test_exchange_keeps_order_between_two_ranks() -> None:
    run_ranks(W, _exchange)


def _reduce_and_broadcast(rank: int) -> None:
    group = dist.group.WORLD
    x = torch.full((300,), 1.0 + 2**-7 * rank, dtype=torch.bfloat16)
    total = comm.all_reduce_sum(x, group)
    assert total.dtype == x.dtype
    assert x[0] == 1.0 + 2**-7 * rank
    assert (total == torch.tensor(3.0 + 3 * 2**-7).bfloat16()).all()
    for dtype in DTYPES:
        out = comm.broadcast(_mine(rank, dtype), group, source=1)
        assert torch.equal(out, _mine(1, dtype))
    for value in ({"plan": [1, 2]}, "x" * 200_000):
        with comm.count_traffic() as traffic:
            assert comm.broadcast_object(value if rank == 2 else None, group, source=2) == value
        assert traffic.calls == (1 if isinstance(value, dict) else 2)
    assert comm.all_gather_objects({rank}, group) == [{r} for r in range(W)]


def test_reduce_and_broadcast() -> None:
    run_ranks(W, _reduce_and_broadcast)


def _counts(rank: int) -> None:
    group = dist.group.WORLD
    with comm.count_traffic() as outer:
        comm.all_gather(torch.zeros(5), group)
        with comm.count_traffic() as traffic:
            comm.all_gather(torch.zeros(5, dtype=torch.bfloat16), group)
            comm.all_to_all([torch.zeros(r) for r in range(W)], [(rank,)] * W, group)
            peer = {0: 1, 1: 0}.get(rank)
            if peer is not None:
                comm.exchange([(peer, torch.zeros(3))], [(peer, torch.zeros(3))], group).wait()
    assert traffic["all_gather"].sent_bytes == traffic["all_gather"].received_bytes == 20
    assert traffic["all_to_all"].sent_bytes == 4 * (3 - rank)
    assert traffic["all_to_all"].received_bytes == 4 * 2 * rank
    assert traffic["exchange"].calls == (rank < 2)
    assert traffic["exchange"].received_bytes == (12 if rank < 2 else 0)
    assert outer.received_bytes == 40
    assert outer.calls == 1
    comm.all_gather(torch.zeros(5), group)
    assert outer.calls == 1
    assert comm.current_traffic() is None


def test_traffic_counts_payload_bytes_and_ends_with_the_block() -> None:
    run_ranks(W, _counts)


def _refusals(rank: int) -> list[str]:
    group = dist.group.WORLD
    messages = []
    for problem, same in [("too short" if rank == 1 else None, 1), (None, ("layout", rank // 2))]:
        with pytest.raises(LayoutError) as caught:
            comm.agree(problem, group, same=same)
        messages.append(str(caught.value))
    comm.agree(None, group, same="equal")
    return messages


def test_a_refusal_on_one_rank_is_raised_on_all() -> None:
    results = run_ranks(W, _refusals)
    assert results[1][0] == "too short"
    assert "ranks [1]" in results[0][0]
    assert "too short" in results[2][0]
    assert all("rank 2 has ('layout', 1)" in result[1] for result in results)


def _handed_a_group_of_others(rank: int) -> list[str]:
    group: Any = dist.new_group([0, 1])
    if rank < 2:
        return []
    messages = []
    for ask in (comm.group_size, comm.group_rank, comm.backend_of, comm.share_memory):
        with pytest.raises(MeshError) as caught:
            ask(group)
        messages.append(str(caught.value))
    return messages


def test_a_group_of_others_is_refused() -> None:
    refused = ["global rank 2 is not in the group it was handed"] * 4
    assert run_ranks(3, _handed_a_group_of_others) == [[], [], refused]


def test_alone_nothing_is_sent() -> None:
    x = torch.randn(2, 3)
    with comm.count_traffic() as traffic:
        assert torch.equal(comm.all_gather(x, None), x[None])
        assert torch.equal(comm.all_to_all([x], [x.shape], None)[0], x)
        assert torch.equal(comm.exchange([(0, x)], [(0, torch.empty(2, 3))], None).wait()[0], x)
        assert torch.equal(comm.all_reduce_sum(x, None), x)
        assert torch.equal(comm.broadcast(x, None), x)
        assert comm.broadcast_object("y", None) == "y"
        assert comm.all_gather_objects("y", None) == ["y"]
    assert traffic.calls == 0
    assert comm.group_size(None) == 1
    assert comm.group_rank(None) == 0
    with pytest.raises(MeshError, match="bad"):
        comm.agree("bad", None, error=MeshError)
