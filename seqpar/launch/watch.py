"""Looking at a run from outside, by its folder: state, ranks, logs; and stopping it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from seqpar.errors import JobSpecError, LaunchError
from seqpar.launch.rundir import RunDir

__all__ = ["find_run", "follow_log", "run_status", "status_view", "stop_run"]


def find_run(job: str) -> RunDir:
    """The run of a name under runs/, or of a folder.

    Raises:
        JobSpecError: there is none; lists those that there are.
    """
    for folder in (Path(job), Path("runs") / job):
        if (folder / "run.json").is_file():
            return RunDir(folder.absolute())
    known = sorted(path.parent.name for path in Path("runs").glob("*/run.json"))
    there = f"there are {', '.join(known)}" if known else "there is none in runs/"
    raise JobSpecError(f"no run {job!r}: {there}; give a run's name, or its folder")


def run_status(run: RunDir) -> dict[str, Any]:
    """State of the run and of each rank, as plain values.

    `state` is running, succeeded, failed, or lost: run.json says that it runs and its launcher,
    on this host, does not exist any more.
    """
    state = run.state()
    if state.get("state") == "running" and not launcher_exists(state):
        state["state"] = "lost"
    now = time.time()
    beats, progress = run.beats(), run.progress()
    ranks = []
    for rank, beat in beats.items():
        report = progress.get(rank, {})
        ranks.append(
            {
                "rank": rank,
                "host": beat["host"],
                "pid": beat["pid"],
                "attempt": beat["attempt"],
                "ended": beat["ended"],
                "heard_s": round(max(0.0, now - beat["time"]), 1),
                "waits_in": beat["collective"],
                "step": report.get("step"),
                "loss": report.get("loss"),
                "tokens_per_s": report.get("tokens_per_s"),
                "memory_bytes": report.get("memory_bytes"),
            }
        )
    return {**state, "run_dir": str(run.path), "by_rank": ranks}


def launcher_exists(state: dict[str, Any]) -> bool:
    """Whether the launcher that wrote run.json still runs (not another of its number)."""
    try:
        process = psutil.Process(int(state["launcher_pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return process.create_time() <= float(state["started"]) + 1.0
    except (psutil.NoSuchProcess, KeyError, ValueError):
        return False


def status_view(status: dict[str, Any]) -> Any:
    """The status as a Rich table."""
    from rich.table import Table

    title = f"{status.get('name')}: {status.get('state')} ({status.get('engine')})"
    columns = ("rank", "host", "attempt", "step", "loss", "tokens/s", "memory", "last heard", "in")
    table = Table(*columns, title=title, caption=status.get("error"))
    for rank in status["by_rank"]:
        memory = rank["memory_bytes"]
        table.add_row(
            str(rank["rank"]),
            rank["host"],
            str(rank["attempt"]),
            _shown(rank["step"], "d"),
            _shown(rank["loss"], ".4f"),
            _shown(rank["tokens_per_s"], ",.0f"),
            "" if memory is None else f"{memory / 2**30:.2f} GiB",
            "ended" if rank["ended"] else f"{rank['heard_s']:.1f} s ago",
            rank["waits_in"] or "",
        )
    return table


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def follow_log(run: RunDir, rank: int) -> Iterator[bytes]:
    """A rank's log piece by piece; an empty piece whenever there is no more yet.

    Raises:
        JobSpecError: the run has no such rank.
    """
    path = run.log(rank)
    if not path.exists():
        there = sorted(int(log.stem.removeprefix("rank-")) for log in run.logs.glob("rank-*.log"))
        raise JobSpecError(f"{run.path} has no log of rank {rank}: there are ranks {there}")
    with path.open("rb") as log:
        while True:
            yield log.read(1 << 16)


def stop_run(run: RunDir, *, timeout_s: float) -> bool:
    """Send the run's launcher SIGTERM and wait for its end; False if it had ended before.

    Raises:
        LaunchError: it does not end in time.
    """
    state = run.state()
    if state.get("state") != "running" or not launcher_exists(state):
        return False
    pid = int(state["launcher_pid"])
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + timeout_s
    while launcher_exists(state):
        if time.monotonic() > deadline:
            raise LaunchError(
                f"launcher {pid} of {run.path} still runs {timeout_s:g} s after SIGTERM: "
                "kill it; its ranks end with it"
            )
        time.sleep(0.1)
    return True
