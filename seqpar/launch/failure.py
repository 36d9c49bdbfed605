"""How a rank failed, in words and as an error."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Any

from seqpar.errors import RankFailedError
from seqpar.launch.placement import Placement
from seqpar.launch.rundir import RunDir

__all__ = ["Failure", "exit_words", "is_echo"]


ECHOES = ("closed by peer", "Connection reset", "Broken pipe", "remote process exited", "NCCL")
"""What torch's collectives say in a rank whose peer has died."""


def exit_words(exit_code: int) -> str:
    """`exited with code 7` or `was killed by SIGKILL`; a negative code is a signal's number."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    try:
        return f"was killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was killed by signal {-exit_code}"


def is_echo(traceback: str) -> bool:
    """Whether a traceback tells of a lost peer, not of a fault of the rank's own."""
    last = traceback.strip().splitlines()[-1:] or [""]
    return any(echo in last[0] for echo in ECHOES)


def place_words(progress: dict[str, Any]) -> str:
    """Where in its training a rank was, in its own last report: step, micro-batch, group."""
    if not progress:
        return ""
    words = f", at step {progress['step']}"
    if progress["micro_batch"] is not None:
        words += f", micro-batch {progress['micro_batch']}"
    if progress["group"]:
        words += f", group {progress['group']}"
    if progress["documents"]:
        shown = progress["documents"][:8]
        more = len(progress["documents"]) - len(shown)
        words += f", documents {shown}" + (f" and {more} more" if more else "")
    return words


@dataclass(frozen=True)
class Failure:
    """The first rank to fail in an attempt; `reason` is why the supervisor ended it, if it did.

    `first_seen`: the engine saw this rank dead before it ended any other.
    """

    rank: int
    exit_code: int
    time: float
    traceback: str = ""
    reason: str = ""
    first_seen: bool = False

    @property
    def blame(self) -> tuple[int, float]:
        """Sorts failures of one attempt: the cause first, then what it led to.

        A rank killed from outside leaves no traceback and comes first. Peers of a dead rank raise
        from their collectives moments later, and the engine ends the rest by SIGTERM.
        """
        if self.exit_code < 0:
            return (0 if self.exit_code != -signal.SIGTERM or self.first_seen else 3), self.time
        return (2 if is_echo(self.traceback) else 1), self.time

    def words(self) -> str:
        """One line: the rank and what became of it."""
        if self.reason:
            return f"rank {self.rank} {self.reason}"
        last = self.traceback.strip().splitlines()[-1:] or [""]
        cause = f" ({last[0]})" if last[0] else ""
        return f"rank {self.rank} {exit_words(self.exit_code)}{cause}"

    def error(self, placement: Placement, run_dir: RunDir) -> RankFailedError:
        """The failure as the error that ends the job."""
        budget = placement.spec.restarts
        spent = f"; its {budget} restarts are spent" if budget else "; it had no restarts"
        where = place_words(run_dir.progress().get(self.rank, {}))
        error = RankFailedError(
            f"job {placement.spec.name}: {self.words()}, of {placement.num_ranks} ranks{where}"
            f"{spent}; its log is {run_dir.log(self.rank)}",
            global_rank=self.rank,
            exit_code=self.exit_code,
        )
        if self.traceback:
            error.add_note(self.traceback)
        return error
