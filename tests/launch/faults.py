"""The fault harness: one real job, faults at given steps, and what must hold after each.

The same for both engines. A fault is done to real processes, files and interfaces from outside;
the job knows nothing of it. `Recovery` is what is measured: from the fault to the first step that
rank 0 takes afterwards.
"""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from seqpar.launch.rundir import RunDir

REPOSITORY = Path(__file__).parents[2]
TRAINING = Path(__file__).with_name("training.py")


@dataclass
class Recovery:
    """A fault, the step at which it was done, and how long until training went on."""

    fault: str
    step: int
    recovery_s: float


@dataclass
class Job:
    """A training under the launcher, in a folder of its own."""

    folder: Path
    engine: str
    ranks: int
    steps: int
    step_s: float = 0.05
    options: tuple[str, ...] = ()
    prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def run(self) -> RunDir:
        return RunDir(self.folder / "runs" / "training")

    @property
    def checkpoints(self) -> Path:
        return self.run.path / "checkpoints"

    def start(self, *, resume: bool = False) -> None:
        """Start the launcher in the background."""
        words = [*self.prefix, sys.executable, "-m", "seqpar.cli", "launch"]
        words += ["--engine", self.engine, "--nproc", str(self.ranks), *self.options]
        words += ["--resume"] if resume else []
        words += [str(TRAINING), "--", "--steps", str(self.steps)]
        words += ["--step-s", str(self.step_s)]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **self.environment}
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
            stderr = (self.folder / "stderr").read_text()
            assert code is None, f"the job ended with {code}: {stderr[-2000:]}"
            assert time.monotonic() < deadline, f"not within {timeout_s} s: {stderr[-2000:]}"
            time.sleep(0.02)
        return value

    def wait_for_step(self, step: int, *, timeout_s: float = 60.0) -> None:
        """Wait until rank 0 has finished the step."""
        self.wait_until(
            lambda: any(done["step"] >= step for done in self.steps_done()), timeout_s=timeout_s
        )

    def suffer(self, fault: str, step: int, *, timeout_s: float = 60.0) -> Recovery:
        """Do the fault after the step, and wait until training goes on."""
        self.wait_for_step(step)
        FAULTS[fault](self)  # may take its time before the blow
        return self.recovery(fault, step, time.time(), timeout_s=timeout_s)

    def lose(
        self, fault: Callable[[], None], name: str, step: int, *, timeout_s: float
    ) -> Recovery:
        """Do a fault to the job's surroundings after the step, and wait until training goes on."""
        self.wait_for_step(step)
        at = time.time()
        fault()
        return self.recovery(name, step, at, timeout_s=timeout_s)

    def recovery(self, fault: str, step: int, at: float, *, timeout_s: float) -> Recovery:
        """Wait for the first step of another attempt than the one that was hit."""
        before = self.steps_done()

        def resumed() -> list[float]:
            later = self.steps_done()[len(before) :]
            return [done["time"] for done in later if done["attempt"] != before[-1]["attempt"]]

        return Recovery(fault, step, self.wait_until(resumed, timeout_s=timeout_s)[0] - at)

    def end(self, *, timeout_s: float = 60.0) -> int:
        """Wait for the job's end; its exit code."""
        assert self.process is not None
        try:
            return self.process.wait(timeout_s)
        finally:
            self.process.kill()
            self.process.wait()

    def pid(self, rank: int) -> int:
        """Process of a rank in the current attempt."""
        return int(self.run.beats()[rank]["pid"])

    def processes(self) -> list[str]:
        """Processes that still run for this job."""
        mine = str(self.run.path)
        found = []
        for process in psutil.process_iter(["cmdline", "environ", "status"]):
            words = " ".join(process.info["cmdline"] or [])
            home = (process.info["environ"] or {}).get("SEQPAR_RUN_DIR", "")
            if (home == mine or mine in words) and process.info["status"] != "zombie":
                found.append(words)
        return found


def kill_rank(job: Job) -> None:
    os.kill(job.pid(1), signal.SIGKILL)


def stop_rank(job: Job) -> None:
    os.kill(job.pid(1), signal.SIGSTOP)


def tear_checkpoint(job: Job) -> None:
    """Cut off the newest checkpoint's largest file, then kill a rank."""
    newest = job.wait_until(lambda: sorted(job.checkpoints.glob("step-*")), timeout_s=20)[-1]
    path = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)
    kill_rank(job)


def fill_disk(job: Job) -> None:
    """Let the kernel refuse larger files than 100 bytes to every rank, for 0.6 s; then kill one.

    What a rank sees is a write that fails half-way, as on a full disk.
    """
    for rank in range(job.ranks):
        resource.prlimit(job.pid(rank), resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    time.sleep(0.6)
    kill_rank(job)


FAULTS: dict[str, Callable[[Job], None]] = {
    "kill a rank": kill_rank,
    "stop a rank": stop_rank,
    "tear the last checkpoint": tear_checkpoint,
    "fill the disk": fill_disk,
}


def check_history(
    done: list[dict[str, Any]], expected: list[dict[str, Any]], *, tolerance: float = 0.0
) -> None:
    """The faulted run's last word on every step is the unfaulted run's: documents and loss.

    Steps that were redone after a fault must agree too, whatever attempt took them; within an
    attempt no step is taken twice or left out.
    """
    assert all(math.isfinite(step["loss"]) for step in expected)
    assert [step["step"] for step in expected] == list(range(len(expected)))
    for attempt in {step["attempt"] for step in done}:
        steps = [step["step"] for step in done if step["attempt"] == attempt]
        assert steps == list(range(steps[0], steps[-1] + 1))
    assert {step["step"] for step in done} == set(range(len(expected)))
    for step in done:
        reference = expected[step["step"]]
        assert step["documents"] == reference["documents"]
        error = abs(step["loss"] - reference["loss"])
        assert error <= tolerance * abs(reference["loss"]), (step, reference)
