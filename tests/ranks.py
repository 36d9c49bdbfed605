"""Run a function on W gloo ranks, each a process of its own, and collect what they return.

Processes are forked from a server that has imported torch already, so a group costs a fraction of
a second; nothing outlives the call. The function must be importable (top level of a module).
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    # transformers takes seconds to import: once here, and not once a rank.
    ["torch", "torch.distributed", "torch.nn.functional", "transformers.modeling_utils"]
)


def run_ranks(
    world_size: int, function: Callable[..., Any], *args: Any, timeout_s: float = 60.0
) -> list[Any]:
    """Call `function(rank, *args)` on every rank of a gloo world; the results in rank order.

    Raises:
        AssertionError: a rank raised, died or did not end in time; holds the first traceback.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(
                target=_rank_main, args=(rank, world_size, folder, timeout_s, function, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout_s)
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        errors = sorted(Path(folder).glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        if errors:
            raise AssertionError("\n".join(f"{path.name}:\n{path.read_text()}" for path in errors))
        codes = [process.exitcode for process in processes]
        assert not stuck, f"ranks {stuck} did not end within {timeout_s} s"
        assert not any(codes), f"exit codes {codes}"
        return [
            torch.load(Path(folder) / f"result-{rank}", weights_only=False)
            for rank in range(world_size)
        ]


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    timeout_s: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    # Fresh memory filled with NaN: an element that nothing wrote cannot pass for a result.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s / 2),
        )
        result = function(rank, *args)
        torch.save(result, Path(folder) / f"result-{rank}")
        dist.destroy_process_group()
    except BaseException:
        (Path(folder) / f"error-{rank}").write_text(traceback.format_exc())
        raise SystemExit(1) from None
