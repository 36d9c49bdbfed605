"""The strategies over several GPUs, one process each: exact against float64, and repeatable."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _on_two_gpus(module: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [*command, "-m", module],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.multigpu
def test_strategies_over_nccl() -> None:
    said = _on_two_gpus("tests.ops.softmax_over_nccl")
    assert "all strategies are within the tolerance" in said


@pytest.mark.multigpu
def test_the_ring_repeats_itself() -> None:
    assert "the ring repeats itself over NCCL" in _on_two_gpus("tests.ops.softmax_repeats")
