"""Run a function on ranks of this machine, each a process of its own, and collect the results.

For commands that measure or check something and end: `seqpar calibrate`, `seqpar check`. Jobs are
for `seqpar.launch`.
"""

from __future__ import annotations

import math
import multiprocessing
import pickle
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from seqpar.errors import LaunchError, MeshError, SeqparError

__all__ = ["run_on_ranks"]

GRACE_S = 10.0
"""Seconds that ranks have to end once one has failed: on NCCL they would wait for it in vain."""


def run_on_ranks(
    function: Callable[..., Any],
    *args: Any,
    ranks: int,
    device: str,
    timeout_s: float,
    preload: Sequence[str] = ("torch",),
) -> list[Any]:
    """`function(rank, *args)` on every rank of a fresh world; the results in rank order.

    Args:
        function: top level of a module; called with torch.distributed initialised, on gloo for
            "cpu" and on NCCL and CUDA device `rank` for "cuda".
        ranks: processes.
        timeout_s: for all ranks, and for their collectives; once a rank has failed, the others
            have GRACE_S.
        preload: modules that the ranks are forked with, so that they are imported once. They must
            not touch CUDA.

    Raises:
        MeshError: fewer than one rank, or more than CUDA devices.
        LaunchError: a rank died, did not end in time, or failed otherwise than with a SeqparError.
        SeqparError: what the first rank that failed raised.
    """
    if ranks < 1:
        raise MeshError(f"at least 1 rank is needed, got {ranks}")
    if device == "cuda" and ranks > torch.cuda.device_count():
        raise MeshError(
            f"{ranks} ranks need as many CUDA devices, found {torch.cuda.device_count()}: "
            "ask for fewer ranks, or for the CPU"
        )
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    with tempfile.TemporaryDirectory() as folder:
        world = (ranks, device, folder, timeout_s)
        processes = [
            context.Process(target=_rank_main, args=(rank, world, function, args), daemon=True)
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        _await(processes, timeout_s)
        for process in processes:
            process.kill()
            process.join()
        ended = [_result(Path(folder), rank) for rank in range(ranks)]
    failures = [(at, result) for at, result in ended if isinstance(result, BaseException)]
    # A rank that says what is wrong comes before those that only lost it, the first before others.
    for _, failure in sorted(failures, key=lambda f: (isinstance(f[1], LaunchError), f[0])):
        raise failure
    return [result for _, result in ended]


def _await(processes: Sequence[BaseProcess], timeout_s: float) -> None:
    """Until all have ended, or the time is up."""
    deadline = time.monotonic() + timeout_s
    running = list(processes)
    while running and (left := deadline - time.monotonic()) > 0:
        wait([process.sentinel for process in running], left)
        if any(process.exitcode for process in running):
            deadline = min(deadline, time.monotonic() + GRACE_S)
        running = [process for process in running if process.exitcode is None]


def _rank_main(
    rank: int,
    world: tuple[int, str, str, float],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    result: Any
    try:
        _join_world(rank, world)
        result = function(rank, *args)
    except SeqparError as error:
        result = error
    except BaseException as error:
        result = LaunchError(f"rank {rank} failed: {type(error).__name__}: {error}")
    try:
        payload = pickle.dumps(result)
    except Exception:
        payload = pickle.dumps(LaunchError(f"rank {rank}: {result}"))
    (Path(world[2]) / f"result-{rank}").write_bytes(payload)
    if dist.is_initialized():  # not before: the others would fail, and say it first
        dist.destroy_process_group()
    if isinstance(result, BaseException):
        raise SystemExit(1)


def _join_world(rank: int, world: tuple[int, str, str, float]) -> None:
    ranks, device, folder, timeout_s = world
    cuda = device == "cuda"
    torch.set_num_threads(1)
    if cuda:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout_s),
        device_id=torch.device("cuda", rank) if cuda else None,
    )


def _result(folder: Path, rank: int) -> tuple[float, Any]:
    """When the rank said what, in ns; after all others if it said nothing."""
    path = folder / f"result-{rank}"
    if not path.exists():
        return math.inf, LaunchError(f"rank {rank} died or did not end in time")
    return path.stat().st_mtime_ns, pickle.loads(path.read_bytes())
