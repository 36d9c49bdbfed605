"""The fault harness: faults done to a real job at given moments, and what must hold after each.

The same for both engines. A fault is done to real processes, files and interfaces from outside;
the job knows nothing of it. `Recovery` is what is measured: from the fault to the first step that
another rank 0 takes. After it nothing of the attempt that was hit may be left: no process, no
listening port, no file of shared memory.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.launch.job import Job


@dataclass
class Recovery:
    """A fault, the step at which it was done, and how long until training went on."""

    fault: str
    step: int
    recovery_s: float


def kill_rank(job: Job, rank: int) -> None:
    os.kill(job.pid(rank), signal.SIGKILL)


def stop_rank(job: Job, rank: int) -> None:
    os.kill(job.pid(rank), signal.SIGSTOP)


def hang_rank(job: Job, rank: int) -> None:
    """The training computes for ever once it gets this signal."""
    os.kill(job.pid(rank), signal.SIGUSR2)


def tear_checkpoint(job: Job, rank: int) -> None:
    """Cut off the newest checkpoint's largest file, then kill a rank."""
    newest = job.wait_until(lambda: sorted(job.checkpoints.glob("step-*")), timeout_s=20)[-1]
    path = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size // 2)
    kill_rank(job, rank)


def fill_disk(job: Job, rank: int) -> None:
    """Fill the checkpoints' volume until a save has failed, then kill a rank.

    Where no volume can be mounted the kernel refuses files over 100 bytes to every rank instead:
    what a rank sees is, as on a full disk, a write that fails half-way.
    """
    failed = failed_saves(job)
    if job.volume is not None:
        job.volume.fill()
    for beat in job.run.beats().values() if job.volume is None else ():
        resource.prlimit(beat["pid"], resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
    job.wait_until(lambda: failed_saves(job) > failed, timeout_s=30)
    kill_rank(job, rank)


def failed_saves(job: Job) -> int:
    """How many checkpoints rank 0 could not write."""
    return job.run.log(0).read_text().count("was not written")


def kill_driver(job: Job, rank: int) -> None:
    """Kill the launcher, and launch again with --resume."""
    job.kill_launcher()
    job.start(resume=True)


def kill_raylet(job: Job, rank: int) -> None:
    assert job.cluster is not None
    job.cluster.kill_last()


def cut_host_off(job: Job, rank: int) -> None:
    """Cut a host's wire: nothing reaches it, and nobody is told."""
    assert job.cluster is not None
    job.cluster.cut_off_last()


FAULTS: dict[str, Callable[[Job, int], None]] = {
    "kill a rank": kill_rank,
    "stop a rank": stop_rank,
    "hang a rank": hang_rank,
    "tear the last checkpoint": tear_checkpoint,
    "fill the disk": fill_disk,
    "kill the driver": kill_driver,
}
HOST_FAULTS: dict[str, Callable[[Job, int], None]] = {
    "kill a raylet": kill_raylet,
    "cut a host off": cut_host_off,
}
"""Each takes the last host that still runs Ray; never the head."""


def suffer(
    job: Job,
    fault: str,
    step: int,
    *,
    victim: float = 0.99,
    delay_s: float = 0.0,
    timeout_s: float = 60.0,
) -> Recovery:
    """Do a fault after a step, wait until training goes on, and see that nothing is left.

    `victim` in [0, 1) chooses the rank, of those that there are; `delay_s` is from the step's end
    to the fault.
    """
    job.wait_for_step(step, timeout_s=timeout_s)
    job.note_ports()
    before = job.steps_done()
    time.sleep(delay_s)
    started = time.time()
    (FAULTS | HOST_FAULTS)[fault](job, int(victim * before[-1]["world"]))
    at = time.time() if fault in ("fill the disk", "tear the last checkpoint") else started

    def resumed() -> list[float]:
        later = job.steps_done()[len(before) :]
        return [done["time"] for done in later if done["pid"] != before[-1]["pid"]]

    recovery = Recovery(fault, step, job.wait_until(resumed, timeout_s=timeout_s)[0] - at)
    if job.volume is not None:
        job.volume.free()
    if fault not in HOST_FAULTS:
        job.check_nothing_left()
    return recovery


def check_history(
    done: list[dict[str, Any]], expected: list[dict[str, Any]], *, tolerance: float = 0.0
) -> None:
    """The faulted run's last word on every step is the unfaulted run's: documents and loss.

    Steps that were redone after a fault must agree too, whatever attempt took them; within an
    attempt (a process of rank 0) no step is taken twice or left out.
    """
    assert all(math.isfinite(step["loss"]) for step in expected)
    assert [step["step"] for step in expected] == list(range(len(expected)))
    for pid in {step["pid"] for step in done}:
        steps = [step["step"] for step in done if step["pid"] == pid]
        assert steps == list(range(steps[0], steps[-1] + 1))
    assert {step["step"] for step in done} == set(range(len(expected)))
    for step in done:
        reference = expected[step["step"]]
        assert step["documents"] == reference["documents"]
        error = abs(step["loss"] - reference["loss"])
        assert error <= tolerance * abs(reference["loss"]), (step, reference)
