"""The long fault harness: seeded faults on both engines, and a table of recovery times.

    python -m tests.launch.soak --engine local --faults 30 --seed 0
    python -m tests.launch.soak --engine ray --faults 30 --seed 0 --rounds 2

A round is one job and its faults: each kind of the engine in a seeded order, at seeded moments, to
seeded ranks. On Ray a round ends with the loss of both hosts that are not the head, of which one
has its raylet killed and the other its wire cut: 4 ranks, then 2 (3 CPUs are left and 3 ranks are
not allowed), then 1. Every job's history is compared with an unfaulted run's, and nothing may be
left behind; the first difference ends the soak.

Rounds that are done are kept under benchmarks/results/<hardware>/, and the next call goes on after
them: `--rounds` says how many to do now.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.launch.faults import FAULTS, HOST_FAULTS, Recovery, check_history, suffer
from tests.launch.hosts import ray_hosts
from tests.launch.job import Job
from tests.launch.volume import small_volume

PER_ROUND = 6
BETWEEN = 7
"""Steps from one fault to the next: at least one checkpoint lies between."""
STEPS = 5 + BETWEEN * PER_ROUND + 20
STEP_S = {"local": 0.05, "ray": 0.3}
HANG_S = {"local": 2.0, "ray": 3.0}
ISOLATED_S = 100.0
"""How long processes on a host that is cut off may take to see that they are."""


@dataclass(frozen=True)
class Blow:
    """A fault to be done: to the rank at `victim` (a share of them), `delay_s` after a step."""

    fault: str
    victim: float
    delay_s: float


def rounds_of(engine: str, count: int, seed: int) -> list[list[Blow]]:
    """`count` seeded faults in rounds, every kind of the engine about as often."""
    chance = random.Random(seed)
    kinds: list[str] = []
    planned = []
    while count:
        size = min(PER_ROUND, count)
        hosts = chance.sample(list(HOST_FAULTS), min(2, size)) if engine == "ray" else []
        while len(kinds) < size:
            kinds += chance.sample(list(FAULTS), len(FAULTS))
        names = kinds[: size - len(hosts)] + hosts
        del kinds[: size - len(hosts)]
        planned.append(
            [Blow(name, chance.random(), STEP_S[engine] * chance.random()) for name in names]
        )
        count -= size
    return planned


@contextmanager
def prepared_job(folder: Path, engine: str) -> Iterator[Job]:
    """A job with a small volume for its checkpoints; on Ray over three hosts with 1, 2, 2 CPUs."""
    settings = {"restarts": 100, "hang_timeout_s": HANG_S[engine]}
    with ExitStack() as stack:
        volume = stack.enter_context(small_volume(folder / "volume"))
        ranks, cluster = 2, None
        if engine == "ray":
            ranks, cluster = 4, stack.enter_context(ray_hosts([1, 2, 2]))
            if not cluster.can_cut_off:
                raise SystemExit("the soak on Ray needs network namespaces: run it as root")
            settings["degrees"] = [1, 2, 4]
        yield Job(folder, engine, ranks, STEPS, STEP_S[engine], settings, cluster, volume)


def run_round(job: Job, blows: list[Blow], expected: list[dict[str, Any]]) -> list[Recovery]:
    """One job, these faults one after another, its end, its history, and what it left behind."""
    found = []
    job.start()
    for number, blow in enumerate(blows):
        step = 5 + BETWEEN * number
        options = {"victim": blow.victim, "delay_s": blow.delay_s, "timeout_s": 120.0}
        found.append(suffer(job, blow.fault, step, **options))
        print(
            f"{job.engine:6} {blow.fault:26} step {step:3}  {found[-1].recovery_s:6.1f} s",
            flush=True,
        )
    assert job.end(timeout_s=180) == 0, job.stderr()
    check_history(job.steps_done(), expected, tolerance=1e-4 if job.cluster else 0.0)
    cut = any(blow.fault == "cut a host off" for blow in blows)
    job.check_nothing_left(ended=True, within_s=ISOLATED_S if cut else 8.0)
    return found


def unfaulted() -> list[dict[str, Any]]:
    """The history that every job must have."""
    with tempfile.TemporaryDirectory() as name:
        job = Job(Path(name), "local", ranks=2, steps=STEPS, step_s=0.0)
        job.start()
        assert job.end() == 0
        return job.steps_done()


def table_of(found: list[Recovery]) -> dict[str, dict[str, float]]:
    """Count, median and longest recovery of every kind of fault."""
    table = {}
    for fault in sorted({recovery.fault for recovery in found}):
        times = [recovery.recovery_s for recovery in found if recovery.fault == fault]
        median, longest = round(statistics.median(times), 1), round(max(times), 1)
        table[fault] = {"count": len(times), "median_s": median, "longest_s": longest}
    return table


def soak(engine: str, count: int, seed: int, limit: int | None) -> dict[str, Any]:
    """Go on with the soak whose rounds are kept, for up to `limit` rounds."""
    path = Path("benchmarks/results") / f"cpu-{os.cpu_count()}-cores" / f"faults-{engine}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    same = (kept.get("seed"), kept.get("faults")) == (seed, count)
    rounds: list[list[dict[str, Any]]] = kept["rounds"] if same else []
    loads: list[float] = kept["loads"] if same else []
    planned = rounds_of(engine, count, seed)
    expected = unfaulted()
    for blows in planned[len(rounds) :][:limit]:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as name, prepared_job(Path(name), engine) as job:
            rounds.append([asdict(recovery) for recovery in run_round(job, blows, expected)])
        loads.append(round(os.getloadavg()[2], 1))
        print(f"round {len(rounds)} of {len(planned)}: {time.monotonic() - started:.0f} s")
        done = [Recovery(**recovery) for each in rounds for recovery in each]
        settings = {
            "engine": engine,
            "seed": seed,
            "faults": count,
            "hang_timeout_s": HANG_S[engine],
        }
        kept = {**settings, "done": len(done), "recovery": table_of(done)}
        kept |= {"loads": loads, "rounds": rounds}
        path.write_text(json.dumps(kept, indent=2) + "\n")
    return kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine", choices=["local", "ray"], required=True)
    parser.add_argument("--faults", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, help="how many to do now; all by default")
    settings = parser.parse_args()
    kept = soak(settings.engine, settings.faults, settings.seed, settings.rounds)
    print(json.dumps(kept["recovery"], indent=2))


if __name__ == "__main__":
    main()
