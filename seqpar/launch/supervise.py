"""Watching the ranks of a job: who hangs, for whom the others wait, and where each one is.

A rank is heard by its beat (`seqpar.launch.worker`). Three states end a wait:

- silent: no beat for `hang_timeout_s`: the process is stopped, or holds the interpreter lock;
- waiting: in one collective call for `hang_timeout_s`, without using the processor;
- missing: neither, while another rank waits: the rank that the others wait for.

A hang is answered by collecting every rank's stack and killing the missing rank; the engine then
sees a dead rank and does what it does about those.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from dataclasses import dataclass, replace
from typing import Any

from seqpar.launch.failure import Failure
from seqpar.launch.placement import Placement
from seqpar.launch.rundir import RunDir

__all__ = ["Hang", "Supervisor", "find_hang"]

POLL_INTERVAL_S = 0.5
STACK_WAIT_S = 0.5


@dataclass(frozen=True)
class Hang:
    """Ranks that the job waits for (`missing`), ranks that wait, and the words for the first."""

    missing: tuple[int, ...]
    waiting: tuple[int, ...]
    reason: str


def find_hang(beats: dict[int, dict[str, Any]], now: float, bound_s: float) -> Hang | None:
    """Who hangs, judged from the last beat of every rank; None if nobody does.

    `beats[rank]` holds `time` (seconds, as `now`), `collective` (the call waited in, or None) and
    `idle_s` (how long the rank has been there without using the processor).
    """
    silent = tuple(rank for rank, beat in beats.items() if now - beat["time"] > bound_s)
    if silent:
        waiting = tuple(rank for rank in beats if rank not in silent and beats[rank]["collective"])
        quiet_s = now - beats[silent[0]]["time"]
        return Hang(silent, waiting, f"gave no sign of life for {quiet_s:.0f} s")
    stuck = tuple(
        rank for rank, beat in beats.items() if beat["collective"] and beat["idle_s"] > bound_s
    )
    if not stuck:
        return None
    waited_s = max(beats[rank]["idle_s"] for rank in stuck)
    missing = tuple(rank for rank in beats if not beats[rank]["collective"])
    if missing:
        names = ", ".join(str(rank) for rank in stuck)
        call = beats[stuck[0]]["collective"]
        where = beats[missing[0]]["where"]
        reason = f"hung at {where}: ranks {names} waited {waited_s:.0f} s for it in {call}"
        return Hang(missing, stuck, reason)
    if len(stuck) < len(beats):
        return None  # the rest are in a collective, but not for long: they may yet arrive
    return Hang(_odd_ones(beats), stuck, _mismatch(beats, waited_s))


def _odd_ones(beats: dict[int, dict[str, Any]]) -> tuple[int, ...]:
    """Ranks in another call than most; the first rank if all are in the same one."""
    calls = [beat["collective"] for beat in beats.values()]
    common = max(sorted(set(calls)), key=calls.count)
    return tuple(rank for rank in beats if beats[rank]["collective"] != common) or (min(beats),)


def _mismatch(beats: dict[int, dict[str, Any]], waited_s: float) -> str:
    calls = ", ".join(f"rank {rank} in {beat['collective']}" for rank, beat in beats.items())
    return f"waited {waited_s:.0f} s in a collective, as all ranks did: {calls}"


class Supervisor:
    """A thread beside an engine that runs its ranks on this machine; used as a context."""

    def __init__(self, placement: Placement, run_dir: RunDir) -> None:
        self.placement = placement
        self.run_dir = run_dir
        self.pids: set[int] = set()
        self.out_of_time = False
        self.hangs: dict[int, str] = {}
        self.attempt = -1
        self.started = time.monotonic()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, name="seqpar-supervisor", daemon=True)

    def __enter__(self) -> Supervisor:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        self._note(self.run_dir.beats())

    def explain(self, failure: Failure) -> Failure:
        """The failure, with the reason if it was this supervisor that ended the rank."""
        return replace(failure, reason=self.hangs.get(failure.rank, failure.reason))

    def _watch(self) -> None:
        while not self.ended.wait(POLL_INTERVAL_S):
            limit_s = self.placement.spec.timeout_s
            if limit_s is not None and time.monotonic() - self.started > limit_s:
                self.out_of_time = True
                os.kill(os.getpid(), signal.SIGTERM)  # the agent stops its ranks on this
                return
            beats = self._note(self.run_dir.beats())
            hang = find_hang(beats, time.time(), self.placement.spec.hang_timeout_s)
            if hang is not None:
                self._end(hang, beats)

    def _note(self, beats: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Keep process ids and attempts; the beats of the newest attempt, once all have beaten."""
        self.pids |= {beat["pid"] for beat in beats.values()}
        newest = max((beat["attempt"] for beat in beats.values()), default=-1)
        if newest > self.attempt:
            self.attempt = newest
            self.run_dir.record("started", attempt=newest, ranks=self.placement.num_ranks)
        current = {rank: beat for rank, beat in beats.items() if beat["attempt"] == newest}
        return {rank: beat for rank, beat in current.items() if is_alive(beat["pid"])}

    def _end(self, hang: Hang, beats: dict[int, dict[str, Any]]) -> None:
        stacks = collect_stacks(self.run_dir, beats)
        target = hang.missing[0]
        self.hangs[target] = hang.reason
        self.run_dir.record(
            "hang",
            attempt=self.attempt,
            missing=list(hang.missing),
            waiting=list(hang.waiting),
            reason=hang.reason,
            stacks={str(rank): text for rank, text in stacks.items()},
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(beats[target]["pid"], signal.SIGKILL)
        self.ended.wait(2.0)  # the next attempt's beats take the place of these


def is_alive(pid: int) -> bool:
    """Whether the process exists."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, 0)
        return True
    return False


def collect_stacks(run_dir: RunDir, beats: dict[int, dict[str, Any]]) -> dict[int, str]:
    """Every rank's stack, by faulthandler on SIGUSR1; a stopped rank is continued for it."""
    for beat in beats.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(beat["pid"], signal.SIGUSR1)
            os.kill(beat["pid"], signal.SIGCONT)
    time.sleep(STACK_WAIT_S)
    stacks = {}
    for rank in beats:
        with contextlib.suppress(OSError):
            stacks[rank] = (run_dir.ranks / f"rank-{rank}.stack").read_text()
    return stacks
