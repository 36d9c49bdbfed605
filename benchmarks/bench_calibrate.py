"""`seqpar calibrate` as a user runs it, timed: on one rank, then on two.

    python benchmarks/bench_calibrate.py --out calibrate.json            # CUDA where there is any
    python benchmarks/bench_calibrate.py --tiny --out /tmp/calibrate.json

What the promised 60 s are measured against is the command's wall-clock time, its imports and the
start of its ranks in it. What the command says as it measures goes to stderr, as it comes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from seqpar.report import hardware, versions

TINY = ["--dim", "64", "--longest-tokens", "512"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("calibrate.json"))
    parser.add_argument("--tiny", action="store_true", help="a small model and short documents")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that each may take")
    return parser.parse_args()


def calibrate(out: Path, ranks: int, *, tiny: bool, limit_s: float) -> dict[str, Any]:
    """One run of the command: its time, and what it measured, or why it gave nothing."""
    words = ["calibrate", "--ranks", str(ranks), "--json", "--out", f"{out}.cost-{ranks}.json"]
    words += TINY if tiny else []
    start = time.perf_counter()
    command = subprocess.Popen(
        [sys.executable, "-m", "seqpar.cli", *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = command.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(command.pid, signal.SIGKILL)  # its ranks too
        command.communicate()
        return {"ranks": ranks, "wall_s": limit_s, "error": "cut off"}
    wall = time.perf_counter() - start
    if command.returncode:
        return {"ranks": ranks, "wall_s": wall, "error": f"exit code {command.returncode}"}
    return {"ranks": ranks, "wall_s": wall, **json.loads(said)}


def main() -> None:
    options = parse_arguments()
    results: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "runs": []}
    for ranks in options.ranks:
        found = calibrate(options.out, ranks, tiny=options.tiny, limit_s=options.limit)
        results["runs"].append(found)
        first = sum(found.get("first_ms", [])) / 1e3
        print(
            f"seqpar calibrate --ranks {ranks}: {found['wall_s']:.1f} s, first runs of a shape "
            f"{first:.1f} s {found.get('error', '')}",
            flush=True,
        )
        options.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
