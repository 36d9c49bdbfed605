"""The state operator over NCCL and over memory that peers read, in bfloat16."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def _torchrun(*script: str) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, *script],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.mark.multigpu
def test_peer_memory_and_graphs() -> None:
    said = _torchrun(str(HERE / "state_on_gpus.py"))
    assert "a captured layer gives what it gives eagerly" in said


@pytest.mark.multigpu
@pytest.mark.parametrize("how", ["eagerly", "replayed"])
def test_a_rank_that_never_arrives_ends_the_others(how: str) -> None:
    said = _torchrun(str(HERE / "late_rank_on_gpus.py"), how)
    assert "rank 0 has waited 8 s for rank 1 in all_gather" in said
    assert "rank 0 ended" in said


@pytest.mark.multigpu
@pytest.mark.parametrize("transport", [("--over-nccl",), ()], ids=["NCCL", "peer memory"])
def test_every_exchange_against_float64(transport: tuple[str, ...]) -> None:
    script = str(ROOT / "benchmarks" / "bench_state.py")
    assert "correct: 48 of 48" in _torchrun(script, "--check-only", *transport)
