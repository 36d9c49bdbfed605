"""The all_gather over memory that peers read, interpreted: ranks are processes."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

W, BLOCKS, TILE, CAPACITY = 3, 4, 16, 128
CALLS = [
    # (words, ranks that give, what each rank reads)
    (100, {0, 1, 2}, ({0, 1, 2}, {0, 1, 2}, {0, 1, 2})),
    (20, {0, 1}, (set(), {0}, {0, 1})),  # a chain, forward
    (20, {1, 2}, ({1, 2}, {2}, set())),  # and backward
    (128, {0}, (set(), {0}, set())),
    (100, {0, 1, 2}, ({0, 2}, {1}, {0, 1, 2})),
] * 3


def _message(rank: int, call: int, words: int) -> Tensor:
    return torch.arange(words, dtype=torch.int32) + 1000 * (W * call + rank)


def _rank(rank: int, memories: list[Tensor], failures: Tensor) -> None:
    from seqpar.kernels.peer_gather_kernel import peer_gather_kernel

    torch.set_num_threads(1)
    peers = torch.tensor([memory.data_ptr() for memory in memories])
    for call, (words, giving, reading) in enumerate(CALLS):
        time.sleep(0.02 * ((call + rank) % W))  # who comes first changes
        gathered = torch.full((W, words), -1, dtype=torch.int32)
        peer_gather_kernel[(min(BLOCKS, -(-words // TILE)),)](
            _message(rank, call, words), gathered, peers, words, CAPACITY,
            GIVES=rank in giving, SOURCES=sum(1 << source for source in reading[rank]),
            RANK=rank, W=W, BLOCKS=BLOCKS, TILE=TILE, LIMITED=False,
        )  # fmt: skip
        for source in range(W):
            nothing = torch.full((words,), -1, dtype=torch.int32)
            wanted = source in reading[rank]
            expected = _message(source, call, words) if wanted else nothing
            failures[rank] += not torch.equal(gathered[source], expected)


def test_ranks_read_what_their_sources_gave() -> None:
    if os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available():
        pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported, and no GPU")
    words = 2 * BLOCKS + 2 * BLOCKS * W + 2 * CAPACITY
    memories = [torch.zeros(words, dtype=torch.int32).share_memory_() for _ in range(W)]
    failures = torch.zeros(W, dtype=torch.int32).share_memory_()
    context = mp.start_processes(_rank, (memories, failures), W, join=False, start_method="spawn")
    end = time.monotonic() + 60
    while not context.join(timeout=1):
        if time.monotonic() > end:
            for process in context.processes:
                process.kill()
            pytest.fail("ranks wait for one another")
    assert failures.tolist() == [0] * W
