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

import psutil

from seqpar.launch.failure import Failure
from seqpar.launch.metrics import MetricsLog
from seqpar.launch.placement import Placement
from seqpar.launch.rundir import RunDir

__all__ = ["Hang", "Supervisor", "find_hang", "serve_request"]

POLL_INTERVAL_S = 0.5
SERVE_WAIT_S = 1.0
DUMP_WAIT_S = 0.2


@dataclass(frozen=True)
class Hang:
    """Ranks that the job waits for (`missing`), ranks that wait, and the words for the first."""

    missing: tuple[int, ...]
    waiting: tuple[int, ...]
    reason: str


def find_hang(beats: dict[int, dict[str, Any]], bound_s: float) -> Hang | None:
    """Who hangs, judged from the last beat of every rank; None if nobody does.

    `beats[rank]` holds `quiet_s` (seconds since it was last heard), `collective` (the call waited
    in, or None), `idle_s` (how long it has been at one place without using the processor) and
    `where` (that place).
    """
    silent = tuple(rank for rank, beat in beats.items() if beat["quiet_s"] > bound_s)
    if silent:
        waiting = tuple(rank for rank in beats if rank not in silent and beats[rank]["collective"])
        quiet_s = beats[silent[0]]["quiet_s"]
        return Hang(silent, waiting, f"gave no sign of life for {quiet_s:.0f} s")
    stuck = tuple(
        rank for rank, beat in beats.items() if beat["collective"] and beat["idle_s"] > bound_s
    )
    if not stuck:
        return None
    waited_s = max(beats[rank]["idle_s"] for rank in stuck)
    missing = tuple(rank for rank in beats if not beats[rank]["collective"])
    if missing:
        waiting = tuple(rank for rank in beats if beats[rank]["collective"])
        names = ", ".join(str(rank) for rank in waiting)
        call = beats[stuck[0]]["collective"]
        where = beats[missing[0]]["where"]
        reason = f"hung at {where}: rank {names} waited {waited_s:.0f} s for it in {call}"
        return Hang(missing, waiting, reason)
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


def last_index(words: list[str], word: str) -> int:
    """Where the word is last; 0 if it is not there."""
    return max((index for index, found in enumerate(words) if found == word), default=0)


class Ears:
    """How long each rank has not been heard, by the listener's own clock.

    Clocks of hosts differ, and a listener that was itself stopped must not blame the ranks: time
    counts by the listener's polls, each for two intervals at most.
    """

    def __init__(self) -> None:
        self.last: dict[int, float] = {}
        self.quiet_s: dict[int, float] = {}
        self.polled = time.monotonic()

    def hear(self, beats: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """The beats with `quiet_s` added."""
        now = time.monotonic()
        passed_s = min(now - self.polled, 2 * POLL_INTERVAL_S)
        self.polled = now
        for rank, beat in beats.items():
            heard = self.last.get(rank) != beat["time"]
            self.quiet_s[rank] = 0.0 if heard else self.quiet_s[rank] + passed_s
            self.last[rank] = beat["time"]
        return {rank: {**beat, "quiet_s": self.quiet_s[rank]} for rank, beat in beats.items()}


class Supervisor:
    """A thread beside an engine; used as a context.

    It asks for stacks and ends through files in the run's folder, which whoever holds a rank's
    process serves: a Ray worker for its rank, this thread itself if `holds_ranks`. When the job's
    time is up it sends its own process SIGTERM, and the engine stops the ranks on that.
    """

    def __init__(self, placement: Placement, run_dir: RunDir, *, holds_ranks: bool) -> None:
        self.placement = placement
        self.run_dir = run_dir
        self.holds_ranks = holds_ranks
        self.pids: set[int] = set()
        self.out_of_time = False
        self.hangs: dict[tuple[int, int], str] = {}
        self.attempt = -1
        self.ears = Ears()
        self.metrics = MetricsLog(run_dir, tensorboard=placement.spec.tensorboard)
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
        with contextlib.suppress(OSError):
            self.metrics.note(self.run_dir.progress())
            self.metrics.close()

    def explain(self, failure: Failure) -> Failure:
        """The failure, with the reason if this supervisor ended the rank in the last attempt."""
        reason = self.hangs.get((self.attempt, failure.rank), failure.reason)
        return replace(failure, reason=reason)

    def _watch(self) -> None:
        while not self.ended.wait(POLL_INTERVAL_S):
            limit_s = self.placement.spec.timeout_s
            if limit_s is not None and time.monotonic() - self.started > limit_s:
                self.out_of_time = True
                os.kill(os.getpid(), signal.SIGTERM)
                return
            with contextlib.suppress(OSError):  # a full disk must not end the watch
                self._look()

    def _look(self) -> None:
        """Keep what the ranks report, and end what hangs."""
        self.metrics.note(self.run_dir.progress())
        beats = self.ears.hear(self._note(self.run_dir.beats()))
        hang = find_hang(beats, self.placement.spec.hang_timeout_s)
        if hang is not None and not self._attempt_failed():
            self._end(hang, beats)

    def _attempt_failed(self) -> bool:
        """Whether the engine is already ending this attempt: its ranks fall silent one by one."""
        ends = [event["event"] for event in self.run_dir.events()]
        return "failed" in ends[last_index(ends, "started") :]

    def _note(self, beats: dict[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """Keep process ids and attempts; the beats of ranks that run, in the newest attempt."""
        newest = max((beat["attempt"] for beat in beats.values()), default=-1)
        if newest > self.attempt:
            self.attempt = newest
            ranks = next(beat["world"] for beat in beats.values() if beat["attempt"] == newest)
            self.run_dir.record("started", attempt=newest, ranks=ranks)
        if self.holds_ranks:
            self.pids |= {beat["pid"] for beat in beats.values()}
        return {
            rank: beat
            for rank, beat in beats.items()
            if beat["attempt"] == newest and not beat["ended"] and self._exists(beat["pid"])
        }

    def _exists(self, pid: int) -> bool:
        """Whether a rank held here has a process; of others their holders tell."""
        return not self.holds_ranks or psutil.pid_exists(pid)

    def _end(self, hang: Hang, beats: dict[int, dict[str, Any]]) -> None:
        """Collect stacks, end the first missing rank, and wait for what the engine makes of it."""
        target = hang.missing[0]
        self.hangs[self.attempt, target] = hang.reason
        others = {rank: beat for rank, beat in beats.items() if rank != target}
        self._request(others, "stack")
        self._request({target: beats[target]}, "end", hang.reason)
        self.ended.wait(SERVE_WAIT_S)
        stacks = self.run_dir.stacks(beats, self.attempt)
        self.run_dir.record(
            "hang",
            attempt=self.attempt,
            missing=list(hang.missing),
            waiting=list(hang.waiting),
            reason=hang.reason,
            stacks={str(rank): text for rank, text in stacks.items()},
        )
        attempt, patience = self.attempt, time.monotonic() + 10 * SERVE_WAIT_S
        while not self.ended.wait(POLL_INTERVAL_S) and time.monotonic() < patience:
            self._note(self.run_dir.beats())
            if self.attempt > attempt:
                return

    def _request(self, beats: dict[int, dict[str, Any]], action: str, reason: str = "") -> None:
        for rank, beat in beats.items():
            self.run_dir.request(rank, self.attempt, action, reason)
            if self.holds_ranks:
                serve_request(self.run_dir, rank, self.attempt, beat["pid"])


def serve_request(run_dir: RunDir, rank: int, attempt: int, pid: int) -> None:
    """Do what is asked of a rank, once, as the holder of its process: dump its stack, or end it.

    The stack comes from faulthandler, on SIGUSR1. A rank that is to end dumps its own first, and
    is continued for it if it was stopped.
    """
    action = run_dir.take_request(rank, attempt)
    if action is None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGUSR1)
        if action == "end":
            os.kill(pid, signal.SIGCONT)
            time.sleep(DUMP_WAIT_S)
            os.kill(pid, signal.SIGKILL)
