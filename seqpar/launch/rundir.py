"""The folder of one run: what is kept, where, and in which form.

runs/<name>/
  run.json          run id, state, launcher's pid, engine, ranks, exit code
  events.jsonl      one JSON object a line: started, failed, restarted, resumed, ended
  logs/rank-<r>.log output of each rank, all attempts
  ranks/            rank-<r>.alive (beat), rank-<r>.progress (step), rank-<r>.stack-<a>
  errors/           attempt-<a>-rank-<r>.json: traceback of a rank that raised
  checkpoints/      seqpar.launch.checkpoint
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqpar.launch.worker import write_atomically

__all__ = ["RunDir"]


@dataclass(frozen=True)
class RunDir:
    """Paths and small files of a run's folder."""

    path: Path

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks"

    @property
    def errors(self) -> Path:
        return self.path / "errors"

    def log(self, rank: int) -> Path:
        """The log of a global rank."""
        return self.logs / f"rank-{rank}.log"

    def error_file(self, attempt: int, rank: int) -> Path:
        """Where a rank that raises leaves its traceback."""
        return self.errors / f"attempt-{attempt}-rank-{rank}.json"

    def prepare(self) -> None:
        """Make the folders; logs, beats and tracebacks of an earlier run go."""
        for folder in (self.logs, self.ranks, self.errors):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        for name in ("events.jsonl", "metrics.jsonl"):
            (self.path / name).unlink(missing_ok=True)

    def next_attempt(self) -> int:
        """Count one more start of the ranks; the first is 0. One caller an attempt: rank 0's."""
        path = self.ranks / "attempts"
        attempt = int(path.read_text()) if path.exists() else 0
        path.write_text(str(attempt + 1))
        return attempt

    def request(self, rank: int, attempt: int, action: str, reason: str = "") -> None:
        """Ask whoever holds a rank's process for its "stack", or for its "end" and why."""
        content: dict[str, object] = {"attempt": attempt, "action": action, "reason": reason}
        write_atomically(self.ranks / f"rank-{rank}.request", content)

    def take_request(self, rank: int, attempt: int) -> str | None:
        """The action asked of a rank in this attempt; a request is taken once, its reason kept."""
        path = self.ranks / f"rank-{rank}.request"
        request = self._read(path)
        if request.get("attempt") != attempt:
            return None
        taken = path.with_suffix(f".{request['action']}-taken")
        with contextlib.suppress(FileNotFoundError):
            os.replace(path, taken)
            return str(request["action"])
        return None

    def end_reason(self, rank: int, attempt: int) -> str:
        """Why the rank was ended on request in this attempt; empty if it was not."""
        request = self._read(self.ranks / f"rank-{rank}.end-taken")
        return str(request["reason"]) if request.get("attempt") == attempt else ""

    def stacks(self, ranks: Iterable[int], attempt: int) -> dict[int, str]:
        """The stacks that ranks have dumped in this attempt."""
        found = {}
        for rank in ranks:
            with contextlib.suppress(OSError):
                found[rank] = (self.ranks / f"rank-{rank}.stack-{attempt}").read_text()
        return found

    def record(self, event: str, /, **values: Any) -> None:
        """Append one event to events.jsonl; a full disk loses it and does not end the job."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **values})
        with contextlib.suppress(OSError), (self.path / "events.jsonl").open("a") as file:
            file.write(line + "\n")

    def events(self) -> list[dict[str, Any]]:
        """All events so far, oldest first; a half-written last line is left out."""
        try:
            lines = (self.path / "events.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def write_state(self, **values: Any) -> None:
        """Merge `values` into run.json, atomically."""
        write_atomically(self.path / "run.json", self.state() | values)

    def state(self) -> dict[str, Any]:
        """run.json, or nothing if there is none."""
        return self._read("run.json")

    def beats(self) -> dict[int, dict[str, Any]]:
        """Last beat of every rank that has beaten, by global rank."""
        return self._of_ranks("alive")

    def mark_ended(self, rank: int) -> None:
        """Note in a rank's beat that its process has ended; by the holder of that process."""
        path = self.ranks / f"rank-{rank}.alive"
        if beat := self._read(path):
            write_atomically(path, {**beat, "ended": True})

    def progress(self) -> dict[int, dict[str, Any]]:
        """Last progress report of every rank that has made one, by global rank."""
        return self._of_ranks("progress")

    def _of_ranks(self, kind: str) -> dict[int, dict[str, Any]]:
        paths = sorted(self.ranks.glob(f"rank-*.{kind}"))
        found = {int(path.stem.removeprefix("rank-")): self._read(path) for path in paths}
        return {rank: found[rank] for rank in sorted(found) if found[rank]}

    def _read(self, path: str | Path) -> dict[str, Any]:
        try:
            content = json.loads((self.path / path).read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        assert isinstance(content, dict)
        return content
