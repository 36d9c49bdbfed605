"""Run a function on ranks of this machine, each a process of its own, and collect the results.

For commands that measure or check something and end: `seqpar calibrate`, `seqpar check`. Jobs are
for `seqpar.launch`.
"""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from seqpar.errors import LaunchError, MeshError, SeqparError

__all__ = ["run_on_ranks"]


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
        timeout_s: for each rank, and for its collectives.
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
        for process in processes:
            process.join(timeout_s)
        for process in processes:
            process.kill()
            process.join()
        results = [_result(Path(folder), rank) for rank in range(ranks)]
    failures = [result for result in results if isinstance(result, BaseException)]
    # A rank that says what is wrong comes before those that only lost it.
    for failure in sorted(failures, key=lambda failure: isinstance(failure, LaunchError)):
        raise failure
    return results


def _rank_main(
    rank: int,
    world: tuple[int, str, str, float],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    result: Any
    try:
        result = _in_world(rank, world, function, args)
    except SeqparError as error:
        result = error
    except BaseException as error:
        result = LaunchError(f"rank {rank} failed: {type(error).__name__}: {error}")
    try:
        payload = pickle.dumps(result)
    except Exception:
        payload = pickle.dumps(LaunchError(f"rank {rank}: {result}"))
    (Path(world[2]) / f"result-{rank}").write_bytes(payload)


def _in_world(
    rank: int,
    world: tuple[int, str, str, float],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
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
    try:
        return function(rank, *args)
    finally:
        dist.destroy_process_group()


def _result(folder: Path, rank: int) -> Any:
    path = folder / f"result-{rank}"
    if not path.exists():
        return LaunchError(f"rank {rank} died or did not end in time")
    return pickle.loads(path.read_bytes())
