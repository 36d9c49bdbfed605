"""A rank that never arrives, for torchrun: `late_rank_on_gpus.py eagerly` or `... replayed`.

The last rank of the group stays away from an all_gather over memory that peers read. The others
must not wait for ever: their CUDA calls fail when the group's time limit is over, and their log
says for whom they waited. Needs several GPUs of one host.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from seqpar import comm
from seqpar.mesh import init_mesh

LIMIT_S = 8
LATEST_S = LIMIT_S + 8


def main() -> None:
    faulthandler.dump_traceback_later(90, exit=True)
    logging.basicConfig()
    size = int(os.environ["WORLD_SIZE"])
    group = init_mesh(sp=size, timeout=timedelta(seconds=LIMIT_S))["sp"].get_group()
    if not comm.shares_memory(group):
        raise SystemExit("these devices cannot read each other's memory")
    message = torch.ones(1000, device="cuda")
    comm.all_gather(message, group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        comm.all_gather(message, group)
    torch.cuda.synchronize()
    dist.barrier(group)
    if dist.get_rank() == size - 1:
        time.sleep(LATEST_S)
    else:
        gather = partial(comm.all_gather, message, group)
        _wait_in_vain(graph.replay if sys.argv[1] == "replayed" else gather)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # the context is lost: nothing can be put in order


def _wait_in_vain(call: Callable[[], object]) -> None:
    start = time.monotonic()
    try:
        call()
        torch.cuda.synchronize()
    except RuntimeError as error:
        waited = time.monotonic() - start
        assert LIMIT_S <= waited < LATEST_S, waited
        print(f"rank {dist.get_rank()} ended after {waited:.1f} s: {str(error)[:80]}", flush=True)
        return
    raise AssertionError("the all_gather ended without the last rank")


if __name__ == "__main__":
    main()
