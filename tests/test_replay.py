"""The same plans give the same bits: a recorded run and two replays of it, each on fresh ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seqpar.determinism import use_deterministic_algorithms, weights_digest
from tests.ranks import run_ranks
from tests.replayed_training import STEPS, train

ROOT = Path(__file__).parent.parent


def _check(run: Callable[[bool], dict[str, Any]], *, ranks: int) -> None:
    recorded = run(False)
    assert len(recorded["losses"]) == STEPS
    assert len(set(recorded["losses"])) == STEPS, "the steps differ"
    assert len(set(recorded["weights"])) == 1, "ranks hold the same weights"
    groups = {tuple(group) for group in recorded["groups"]}
    expected = {(1, "local")} if ranks == 1 else {(1, "local"), (2, "ring"), (2, "ulysses")}
    assert groups == expected
    for _ in range(2):
        assert run(True) == recorded


@pytest.mark.parametrize("ranks", [1, 2])
def test_replays_repeat_every_bit(ranks: int, tmp_path: Path) -> None:
    plans = tmp_path / "plans.jsonl"
    _check(lambda replay: run_ranks(ranks, train, plans, replay)[0], ranks=ranks)


def _on_gpus(ranks: int, dtype: str, plans: Path, replay: bool) -> dict[str, Any]:
    """A run of its own: torchrun, NCCL, a GPU for each rank."""
    out = plans.with_name("run.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "tests.replayed_training"]
    command += ["--plans", str(plans), "--out", str(out), "--dtype", dtype]
    done = subprocess.run(
        command + ["--replay"] * replay,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
            "OMP_NUM_THREADS": "1",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    found: dict[str, Any] = json.loads(out.read_text())
    out.unlink()
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replays_repeat_every_bit_on_one_gpu(dtype: str, tmp_path: Path) -> None:
    plans = tmp_path / "plans.jsonl"
    _check(lambda replay: _on_gpus(1, dtype, plans, replay), ranks=1)


@pytest.mark.multigpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replays_repeat_every_bit_on_two_gpus(dtype: str, tmp_path: Path) -> None:
    plans = tmp_path / "plans.jsonl"
    _check(lambda replay: _on_gpus(2, dtype, plans, replay), ranks=2)


def test_a_digest_tells_weights_apart() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    digest = weights_digest(model)
    assert digest == weights_digest(model)
    with torch.no_grad():
        model.bias[1] = torch.nextafter(model.bias[1], torch.tensor(9.0, dtype=torch.bfloat16))
    assert weights_digest(model) != digest
    model.requires_grad_(False).to(torch.float32)
    assert weights_digest(model) != digest


def test_the_mode_leaves_a_setting_of_cublas_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    use_deterministic_algorithms()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_algorithms()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
