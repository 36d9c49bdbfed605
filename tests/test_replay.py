"""The same plans give the same bits: a run, its replay on those ranks, and one on fresh ranks."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from seqpar.determinism import use_deterministic_algorithms, weights_digest
from tests.ranks import run_ranks
from tests.replayed_training import STEPS, train_again

ROOT = Path(__file__).parent.parent
LIMIT_S = 120


Runs = list[dict[str, Any]]


def _check(run: Callable[[bool, int], Runs], *, ranks: int) -> None:
    """`run(replay, again)`: a training and so many replays of it, on ranks of its own."""
    recorded, *replays = run(False, 1)
    assert len(recorded["losses"]) == STEPS
    assert len(set(recorded["losses"])) == STEPS, "the steps differ"
    assert len(set(recorded["weights"])) == 1, "ranks hold the same weights"
    groups = {tuple(group) for group in recorded["groups"]}
    expected = {(1, "local")} if ranks == 1 else {(1, "local"), (2, "ring"), (2, "ulysses")}
    assert groups == expected
    replays += run(True, 0)
    assert replays == [recorded] * 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_replays_repeat_every_bit(ranks: int, tmp_path: Path) -> None:
    plans = tmp_path / "plans.jsonl"
    _check(lambda *how: run_ranks(ranks, train_again, plans, *how)[0], ranks=ranks)


def _on_gpus(ranks: int, dtype: str, plans: Path, replay: bool, again: int) -> Runs:
    """torchrun, NCCL, a GPU for each rank. What ranks say is not kept back: see it with -s."""
    out = plans.with_name("runs.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(_free_port())]
    command += ["-m", "tests.replayed_training", "--plans", str(plans), "--out", str(out)]
    command += ["--dtype", dtype, "--again", str(again), *["--replay"] * replay]
    search = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, cwd=ROOT) as torchrun:
        try:
            assert torchrun.wait(LIMIT_S) == 0
        finally:
            torchrun.terminate()  # and not killed: it has ranks to end
    runs: Runs = json.loads(out.read_text())
    out.unlink()
    return runs


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replays_repeat_every_bit_on_one_gpu(dtype: str, tmp_path: Path) -> None:
    plans = tmp_path / "plans.jsonl"
    _check(lambda *how: _on_gpus(1, dtype, plans, *how), ranks=1)


@pytest.mark.multigpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_replays_repeat_every_bit_on_two_gpus(dtype: str, tmp_path: Path) -> None:
    plans = tmp_path / "plans.jsonl"
    _check(lambda *how: _on_gpus(2, dtype, plans, *how), ranks=2)


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
