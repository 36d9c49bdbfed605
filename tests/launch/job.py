"""One real training under the launcher, and what can be seen of it from outside."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seqpar.launch.rundir import RunDir
from tests.launch.hosts import RayHosts
from tests.launch.leftovers import (
    listening,
    ports_of,
    processes_of,
    shared_memory,
    train_actors,
    unused_shared_memory,
)
from tests.launch.volume import Volume

REPOSITORY = Path(__file__).parents[2]
TRAINING = Path(__file__).with_name("training.py")


@dataclass
class Job:
    """A training under the launcher, in a folder of its own; on a Ray cluster if one is given."""

    folder: Path
    engine: str
    ranks: int
    steps: int
    step_s: float = 0.05
    settings: dict[str, object] = field(default_factory=dict)
    cluster: RayHosts | None = None
    volume: Volume | None = None
    process: subprocess.Popen[bytes] | None = None
    shared_before: set[Path] = field(default_factory=shared_memory)
    ports: set[int] = field(default_factory=set)

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "runs" / "training")

    @property
    def checkpoints(self) -> Path:
        return self.volume.folder if self.volume else self.run.path / "checkpoints"

    def start(self, *, resume: bool = False) -> None:
        """Start the launcher in the background."""
        words = [sys.executable, "-m", "seqpar.cli", "launch"]
        words += ["--engine", self.engine, "--nproc", str(self.ranks)]
        settings = {"checkpoint_dir": self.checkpoints, **self.settings}
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        if self.cluster is not None:
            words = [*self.cluster.hosts[0].prefix, *words]
            settings["address"] = self.cluster.address
            environment["RAY_AUTH_TOKEN_PATH"] = self.cluster.token
        for name, value in settings.items():
            words += ["--set", f"{name}={value}"]
        words += ["--resume"] if resume else []
        words += [str(TRAINING), "--", "--steps", str(self.steps), "--step-s", str(self.step_s)]
        with (self.folder / "stderr").open("wb") as stderr:
            self.process = subprocess.Popen(
                words, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=stderr
            )

    def steps_done(self) -> list[dict[str, Any]]:
        """Every step that rank 0 has finished, in the order of time."""
        try:
            lines = (self.run.path / "steps.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def wait_until(self, ready: Callable[[], Any], *, timeout_s: float) -> Any:
        """Poll until `ready()` is true; fail if the job ends or the time is up before."""
        deadline = time.monotonic() + timeout_s
        while not (value := ready()):
            assert self.process is not None
            code = self.process.poll()
            assert code is None, f"the job ended with {code}: {self.stderr()}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {self.stderr()}"
            time.sleep(0.02)
        return value

    def wait_for_step(self, step: int, *, timeout_s: float = 60.0) -> None:
        """Wait until rank 0 has finished the step."""
        self.wait_until(
            lambda: any(done["step"] >= step for done in self.steps_done()), timeout_s=timeout_s
        )

    def end(self, *, timeout_s: float = 60.0) -> int:
        """Wait for the job's end; its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self.process.wait()

    def kill_launcher(self) -> None:
        """Kill the launcher, as by the kernel when memory runs out."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def pid(self, rank: int) -> int:
        """Process of a rank in the current attempt."""
        return int(self.run.beats()[rank]["pid"])

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text()[-2000:]

    def note_ports(self) -> set[int]:
        """The ports that the job's ranks listen and meet on now; kept in `ports` for later."""
        now = ports_of(processes_of(self.run.path))
        self.ports |= now
        return now

    def left_behind(self, *, ended: bool = False) -> list[object]:
        """Processes, ports and shared memory of attempts that are over; of all if `ended`."""
        ranks = processes_of(self.run.path)
        newest = -1 if ended else max(ranks.values(), default=-1)
        left: list[object] = [pid for pid, attempt in ranks.items() if ended or attempt != newest]
        prefixes = [host.prefix for host in self.cluster.hosts] if self.cluster else [()]
        left += sorted((self.ports - self.note_ports()) & listening(prefixes))
        left += sorted(unused_shared_memory(self.shared_before))
        if ended and self.cluster is not None:
            left += train_actors(self.cluster.raylets.values())
        return left

    def check_nothing_left(self, *, ended: bool = False, within_s: float = 8.0) -> None:
        """Fail if something of an attempt that is over is still there after `within_s`."""
        deadline = time.monotonic() + within_s
        while left := self.left_behind(ended=ended):
            assert time.monotonic() < deadline, f"left behind: {left}"
            time.sleep(0.2)
