"""The long fault harness: seeded faults on both engines, and a table of recovery times.

    python -m tests.launch.soak --engine local --faults 30 --seed 0
    python -m tests.launch.soak --engine ray --faults 30 --seed 0

Every job's history is compared with an unfaulted run's; the first that differs ends the soak. The
table goes to the terminal and, as JSON, under benchmarks/results/<hardware>/.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.launch.faults import FAULTS, Job, Recovery, check_history
from tests.launch.hosts import RayHosts, ray_hosts

BETWEEN = 7
"""Steps from one fault to the next: at least one checkpoint lies between."""


def sets(**values: object) -> tuple[str, ...]:
    """Values as `--set` words."""
    return tuple(word for name, value in values.items() for word in ("--set", f"{name}={value}"))


def kill_driver(job: Job, step: int) -> Recovery:
    """Kill the launcher, and launch again with --resume."""
    job.wait_for_step(step)
    assert job.process is not None
    done, at = len(job.steps_done()), time.time()
    job.process.send_signal(signal.SIGKILL)
    job.process.wait()
    job.start(resume=True)
    job.wait_until(lambda: len(job.steps_done()) > done, timeout_s=120)
    return Recovery("kill the driver", step, job.steps_done()[done]["time"] - at)


def round_of_faults(job: Job, faults: list[str], cluster: RayHosts | None) -> list[Recovery]:
    """One job, these faults one after another, then its end and what it left behind."""
    found = []
    job.start()
    job.wait_for_step(0, timeout_s=120)
    for number, fault in enumerate(faults):
        step = 5 + BETWEEN * number
        if fault == "kill the driver":
            found.append(kill_driver(job, step))
        elif fault in FAULTS:
            found.append(job.suffer(fault, step, timeout_s=120))
        else:
            assert cluster is not None
            act = cluster.kill if fault == "kill a raylet" else cluster.cut_off
            found.append(job.lose(lambda act=act: act(1), fault, step, timeout_s=120))
        print(f"{job.engine:6} {fault:26} step {step:3}  {found[-1].recovery_s:6.1f} s", flush=True)
    code = job.end(timeout_s=180)
    assert code == 0, f"ended with {code}: {(job.folder / 'stderr').read_text()[-2000:]}"
    return found


def split_launches(job: Job) -> list[dict]:
    """The steps done, with attempts counted on over launches, which each count from 0."""
    steps, launch, last = job.steps_done(), 0, (-1, -1)
    for step in steps:
        if (step["attempt"], step["step"]) <= last:
            launch += 1000
        last = step["attempt"], step["step"]
        step["attempt"] += launch
    return steps


@contextmanager
def surroundings(engine: str) -> Iterator[tuple[RayHosts | None, dict]]:
    """What a job of the engine runs on, and the job's fields for it."""
    if engine == "local":
        yield None, {"ranks": 2, "options": sets(restarts=100, hang_timeout_s=2)}
        return
    with ray_hosts(2, cpus=2) as cluster:
        fields = {"restarts": 100, "hang_timeout_s": 3, "address": cluster.address}
        yield (
            cluster,
            {
                "ranks": 4,
                "step_s": 0.3,
                "options": sets(**fields, degrees="[1,2,4]"),
                "prefix": cluster.hosts[0].prefix,
                "environment": {"RAY_AUTH_TOKEN_PATH": cluster.environment["RAY_AUTH_TOKEN_PATH"]},
            },
        )


def soak(engine: str, count: int, seed: int, per_round: int) -> list[Recovery]:
    """`count` seeded faults in rounds of `per_round`; each round is one job."""
    chance = random.Random(seed)
    found: list[Recovery] = []
    steps = 5 + BETWEEN * per_round + 40
    with tempfile.TemporaryDirectory() as name:
        reference = Job(Path(name), "local", ranks=2, steps=steps)
        reference.start()
        assert reference.end() == 0
        expected = reference.steps_done()
    while len(found) < count:
        faults = chance.choices([*FAULTS, "kill the driver"], k=min(per_round, count - len(found)))
        if engine == "ray":
            faults[-1] = chance.choice(["kill a raylet", "cut a host off"])
        with tempfile.TemporaryDirectory() as name, surroundings(engine) as (cluster, fields):
            job = Job(Path(name), engine, steps=steps, **fields)
            found += round_of_faults(job, faults, cluster)
            check_history(split_launches(job), expected, tolerance=1e-4 if cluster else 0.0)
            deadline = time.monotonic() + (100 if "cut a host off" in faults else 5)
            while left := job.processes():
                assert time.monotonic() < deadline, left
                time.sleep(0.2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["local", "ray"], required=True)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-round", type=int, default=8)
    settings = parser.parse_args()
    found = soak(settings.engine, settings.faults, settings.seed, settings.per_round)
    table = {}
    for fault in sorted({recovery.fault for recovery in found}):
        times = [recovery.recovery_s for recovery in found if recovery.fault == fault]
        table[fault] = {
            "count": len(times),
            "median_s": round(statistics.median(times), 1),
            "longest_s": round(max(times), 1),
        }
    print(json.dumps(table, indent=2))
    folder = Path("benchmarks/results") / f"cpu-{os.cpu_count()}-cores"
    folder.mkdir(parents=True, exist_ok=True)
    result = {"engine": settings.engine, "seed": settings.seed, "recovery": table}
    (folder / f"faults-{settings.engine}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
