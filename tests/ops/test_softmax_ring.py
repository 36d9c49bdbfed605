"""The ring on gloo ranks against the whole stream in float64: per token, every gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils._pytree as pytree
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar import comm
from seqpar.layout import SequenceLayout
from seqpar.ops import ring
from seqpar.ops.ring import ring_backward, ring_forward
from seqpar.ops.ring_late import heads_before_last_message
from seqpar.ops.ring_schedule import most_keys_sent, ring_schedule
from seqpar.ops.softmax_operands import Operands
from seqpar.ops.softmax_tiles import Mask, Tile
from seqpar.ops.token_ranges import num_tokens
from tests.ops.softmax_cases import Case, assert_exact, device_of, layouts, run_case, run_cases
from tests.ranks import run_ranks

DOCUMENTS = (0, 3, 40, 41, 77)
MASKS = [(True, None), (False, None), (True, 9), (False, 9)]


def _cases(world_size: int) -> list[Case]:
    made = [Case(layout) for layout in layouts((0, 61), world_size)]
    made += [
        Case(layout, causal=causal, window=window)
        for layout in layouts(DOCUMENTS, world_size)
        for causal, window in MASKS
    ]
    zigzag = SequenceLayout.zigzag(DOCUMENTS, world_size)
    heads = [(3, 3), (4, 1), (6, 2)]
    made += [Case(zigzag, heads=h, kv_heads=g, key_dim=8, value_dim=6) for h, g in heads]
    made.append(Case(zigzag, batch=2, key_dim=6, value_dim=10, dtype=torch.float64))
    made.append(Case(SequenceLayout.zigzag((0, 2), world_size)))
    return made


@pytest.mark.parametrize(
    ("world_size", "late"),
    [*((size, False) for size in range(2, 9)), (2, True), (3, True), (8, True)],
)
def test_ring_equals_one_device(world_size: int, late: bool) -> None:
    cases = [replace(case, late=late) for case in _cases(world_size)]
    results = run_ranks(world_size, run_cases, cases)
    for i, case in enumerate(cases):
        assert_exact(case, [result[i] for result in results])


@pytest.mark.parametrize(
    ("heads", "kv_heads", "documents", "heads_first"),
    [
        (32, 32, (0, 32768), 28),  # 65,536 tokens on two H200s
        (32, 8, (0, 32768), 7),  # a quarter of the message
        (32, 1, (0, 32768), 0),  # nothing to cut
        (4, 4, (0, 32768), 0),  # an own block of 5 ms
        (32, 32, (0, 8192), 0),  # of 2.5 ms
        (32, 32, (0, 32768, 65536), 28),
        (32, 32, (0, 32768, 36864), 0),  # a short document
        (32, 32, tuple(range(0, 65537, 4096)), 0),
        (32, 32, (0, 0), 0),
    ],
    ids=str,
)
def test_which_own_blocks_are_worked_on_in_two_parts(
    heads: int, kv_heads: int, documents: tuple[int, ...], heads_first: int
) -> None:
    q, k = (torch.empty(1, documents[-1], h, 128, device="meta") for h in (heads, kv_heads))
    x = Operands(q, q, k, k, q, q[..., 0])
    tiles = [Tile(a, b, a, b, None, 0) for a, b in itertools.pairwise(documents)]
    elements = k.numel()  # k and v in 16 bits are as many bytes as k in 32
    assert heads_before_last_message(x, tiles, elements) == heads_first
    assert heads_before_last_message(x, tiles, 0) == 0


@pytest.mark.parametrize("case", _cases(1), ids=str)
def test_one_rank_needs_no_group(case: Case) -> None:
    assert_exact(case, [run_case(0, case)])


@pytest.mark.parametrize("mask", [Mask(), Mask(window=9), Mask(causal=False)], ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_steps_of_the_ranks_match(world_size: int, mask: Mask) -> None:
    """What a rank receives at a step is what its owner sends; backward fetches one block less.

    No step sends more keys than every rank can say beforehand.
    """
    for layout in layouts(DOCUMENTS, world_size):
        ranks = tuple(range(world_size))
        most = most_keys_sent(layout, layout, mask)
        assert most <= max(layout.tokens_on(rank) for rank in ranks)
        schedules = [ring_schedule(layout, layout, rank, mask, ranks) for rank in ranks]
        for rank, schedule in enumerate(schedules):
            assert schedule.backward[0] == schedule.forward[-1]
            assert schedule.backward[-1] == schedule.forward[0]
            for i, step in enumerate(schedule.forward[1:], 1):
                owner = schedules[step.recv_from]
                sent = owner.forward[i] if len(owner.forward) > 1 else None
                assert step.num_recv == (num_tokens(sent.send_keys) if sent else 0)
                assert sent is None or sent.send_to == rank
                assert step.num_recv <= most
                assert len(schedule.backward) == len(schedule.forward)


def _traffic(rank: int, case: Case) -> tuple[int, int]:
    with comm.count_traffic() as traffic:
        run_case(rank, case)
    return traffic["exchange"].sent_bytes, traffic["exchange"].calls


def test_only_what_the_mask_lets_through_is_sent() -> None:
    """Causal and contiguous: rank r sends its block to the ranks after it alone, dk and dv back.

    Forward and backward; but a right neighbour has kept the block for backward.
    """
    case = Case(SequenceLayout.contiguous((0, 64), 4), options={"check": False})
    block = 16 * 2 * (8 + 8) * 4  # tokens, kv heads, K + V, bytes
    sent = [bytes_sent for bytes_sent, _ in run_ranks(4, _traffic, case)]
    kept = [1, 1, 1, 0]
    assert sent == [block * (2 * (3 - rank) - kept[rank] + rank) for rank in range(4)]


def test_a_late_message_is_the_same_message() -> None:
    case = Case(SequenceLayout.zigzag((0, 64), 3), options={"check": False})
    assert run_ranks(3, _traffic, case) == run_ranks(3, _traffic, replace(case, late=True))


@pytest.mark.parametrize("late", [False, True])
def test_documents_on_one_rank_send_nothing(late: bool) -> None:
    layout = SequenceLayout.contiguous((0, 16, 32, 40, 48), 3)
    case = Case(layout, options={"check": False}, late=late)
    assert run_ranks(3, _traffic, case) == [(0, 0)] * 3
    assert most_keys_sent(case.layout, case.layout, Mask()) == 0


def _order(rank: int, case: Case) -> list[str]:
    """What the ring does, in order: an exchange is posted, or a block's attention is computed."""
    done: list[str] = []

    def noted(what: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any, **options: Any) -> Any:
            done.append(what)
            return call(*args, **options)

        return noting

    with pytest.MonkeyPatch.context() as patch:
        for name in ("exchange", "exchange_lent"):
            patch.setattr(comm, name, noted("post", getattr(comm, name)))
        patch.setattr(ring, "attend", noted("forward", ring.attend))
        patch.setattr(ring, "attend_backward", noted("backward", ring.attend_backward))
        run_case(rank, case)
    return done


def test_a_transfer_is_posted_before_the_attention_it_hides_under() -> None:
    case = Case(SequenceLayout.zigzag((0, 64), 3), options={"check": False})
    forward = ["post", "forward", "post", "forward", "forward"]
    # Backward: the next block and, after a block's attention, its gradients to their owner.
    backward = ["post", "backward", "post", "backward", "post", "backward"]
    assert run_ranks(3, _order, case) == [[*forward, *backward]] * 3
    backward[-2:] = ["backward", "post", "backward"]  # the own block is long: two parts of it
    assert run_ranks(3, _order, replace(case, late=True)) == [[*forward, *backward]] * 3


class _PeakBytes(TorchDispatchMode):
    """The most bytes that were alive at once in tensors made inside the block.

    Not those of the tensors given, which views share.
    """

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.peak = 0
        self._given = {x.untyped_storage().data_ptr() for x in given}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for x in pytree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage.data_ptr() not in self._given:
                    self._alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {p: entry for p, entry in self._alive.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def _peak_bytes(rank: int, case: Case) -> tuple[int, int]:
    """Peak of forward beside q, k, v, and of backward beside those, dout and what forward left."""
    q, k, v, dout = (case.layout.shard(x, rank) for x in case.streams())
    ranks = tuple(range(case.layout.world_size))
    schedule = ring_schedule(case.layout, case.layout, rank, Mask(), ranks)
    with _PeakBytes(q, k, v) as forward:
        out, lse, kept = ring_forward(q, k, v, schedule, dist.group.WORLD, 0.3)
    with _PeakBytes(q, k, v, dout, out, lse, *kept) as backward:
        operands = Operands(dout, q, k, v, out, lse)
        with device_of(case):
            ring_backward(operands, kept, schedule, dist.group.WORLD, 0.3)
    return forward.peak, backward.peak


FORWARD_TENSORS = 4 + 5
"""Two blocks of k and v; out, a block's part of it, and three terms of PyTorch's merge of both."""

BACKWARD_TENSORS = 4 + 4 + 7
"""Two blocks of k and v; two of their gradients; the two layers of dq, dk and dv, and a part."""


@pytest.mark.parametrize(
    ("world_size", "batch", "bounds"),
    [(5, 1, (0, 480)), (8, 1, (0, 768)), (5, 2, (0, 480)), (5, 1, (0, 200, 290, 480))],
    ids=["5", "8", "a batch of two", "packed"],
)
@pytest.mark.parametrize("late", [False, True])
def test_memory_of_a_rank_is_its_own_tokens_and_two_blocks(
    world_size: int, batch: int, bounds: tuple[int, ...], late: bool
) -> None:
    """In tensors of a rank's tokens, whatever the ranks: a third block would add two of them."""
    layout = SequenceLayout.zigzag(bounds, world_size)
    case = Case(layout, batch=batch, heads=4, kv_heads=4, key_dim=16, value_dim=16, late=late)
    tensor = batch * 96 * 4 * 16 * 4  # bytes of one rank's q
    peaks = run_ranks(world_size, _peak_bytes, case)
    forward, backward = (max(each) for each in zip(*peaks, strict=True))
    assert 5 * tensor <= forward <= FORWARD_TENSORS * tensor, forward / tensor
    assert 8 * tensor <= backward <= BACKWARD_TENSORS * tensor, backward / tensor
