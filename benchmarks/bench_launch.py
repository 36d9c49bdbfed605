"""From a command to the first collective of 4 ranks: torchrun, the local engine, an embedded Ray.

python benchmarks/bench_launch.py [--runs 3]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

RANKS = 4
PROMISED_S = {"local": 6.0, "ray": 25.0}
SCRIPT = """
import time
import torch, torch.distributed as dist
dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
if dist.get_rank() == 0: print("first", time.time(), flush=True)
dist.destroy_process_group()
"""
LAUNCH = ["-m", "seqpar.cli", "launch", "--nproc", str(RANKS)]
COMMANDS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"],
    "local": [*LAUNCH, "--engine", "local"],
    "ray": [*LAUNCH, "--engine", "ray"],
}


def measure(words: list[str], folder: Path) -> tuple[float, float]:
    """Seconds from the command to the first collective, and to the command's end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    started = time.time()
    done = subprocess.run(
        [sys.executable, *words, "first.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    ended = time.time()
    if done.returncode:
        raise SystemExit(done.stderr)
    line = next(line for line in done.stdout.splitlines() if "first" in line)
    return float(line.split()[-1]) - started, ended - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    settings = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "first.py").write_text(SCRIPT)
        for engine, words in COMMANDS.items():
            found = [measure(words, Path(name)) for _ in range(settings.runs)]
            first, whole = [pair[0] for pair in found], [pair[1] for pair in found]
            rows[engine] = {
                "median_s": round(statistics.median(first), 1),
                "longest_s": round(max(first), 1),
                "whole_s": round(statistics.median(whole), 1),
                "promised_s": PROMISED_S.get(engine),
            }
            print(f"{engine:9} {rows[engine]}", flush=True)
    result = {
        "ranks": RANKS,
        "runs": settings.runs,
        "load_at_the_end": [round(load, 1) for load in os.getloadavg()],
        "torch": torch.__version__,
        "first_collective": rows,
    }
    path = Path("benchmarks/results") / f"cpu-{os.cpu_count()}-cores" / "launch.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
