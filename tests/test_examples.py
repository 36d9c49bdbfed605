"""The demo's whole job, small: planned, scattered, trained, reported, by both engines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.launch.hosts import ray_hosts

ROOT = Path(__file__).parent.parent
JOB = ROOT / "examples" / "hybrid_lm" / "job.yaml"
SMALL = [
    *("--steps", "4", "--budget-tokens", "8192", "--context-tokens", "4096", "--dim", "64"),
    *("--heldout-tokens", "4096", "--cpu-memory-gib", "0.02", "--compare-every", "2"),
    *("--checkpoint-every", "2", "--learning-rate", "0.02"),
]


def _launch(
    folder: Path, *options: str, prefix: Sequence[str] = (), environment: Mapping[str, str] = {}
) -> subprocess.CompletedProcess:
    command = [*prefix, sys.executable, "-m", "seqpar.cli", "launch", *options, str(JOB)]
    command += ["--set", f"args={json.dumps(SMALL)}", "--set", f"run_dir={folder / 'run'}"]
    environment = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=170
    )


def _check_report(run_dir: Path, *, steps: int) -> dict[str, Any]:
    report = json.loads((run_dir / "report.json").read_text())
    assert report["heldout_loss_last"] < report["heldout_loss_first"] - 0.5
    assert report["parity_relative_error"] < 1e-4
    assert report["wall_s"] > 0
    assert report["speedup_over_fixed_degree"] > 0
    assert report["comparison"]["batches"] == steps // 2
    assert report["versions"]["torch"]
    assert report["hardware"]["cores"]
    assert [step["step"] for step in report["steps"]] == list(range(steps))
    for step in report["steps"]:
        assert step["tokens"] > 0
        assert step["measured_ms"] > 0
        assert step["predicted_ms"] == pytest.approx(step["plan"]["makespan_ms"])
        planned = [
            sequence
            for micro_batch in step["plan"]["micro_batches"]
            for group in micro_batch["groups"]
            for sequence in group["sequences"]
        ]
        assert sorted(planned) == list(range(step["documents"]))
    page = (run_dir / "report.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r'(src|href)="(?!#)', page), "the page refers to nothing outside itself"
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir())[-1] == "step-00000004"
    return report


@pytest.mark.slow
def test_the_demo_runs_on_the_local_engine(tmp_path: Path) -> None:
    done = _launch(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    _check_report(tmp_path / "run", steps=4)
    for shown in ("plan of step 0", "parity of 4 ranks", "held-out loss after 4", "step   3"):
        assert shown in done.stdout, done.stdout
    logs = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert logs == [f"rank-{rank}.log" for rank in range(4)]


@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_runs_on_an_embedded_ray(tmp_path: Path) -> None:
    done = _launch(tmp_path, "--engine", "ray")
    assert done.returncode == 0, done.stdout + done.stderr
    _check_report(tmp_path / "run", steps=4)


@pytest.mark.slow
@pytest.mark.ray
def test_the_demo_runs_on_a_ray_cluster_over_three_hosts(tmp_path: Path) -> None:
    """Hosts with addresses of their own, of which none holds all 4 ranks."""
    pytest.importorskip("ray")
    with ray_hosts([1, 2, 2]) as cluster:
        options = ("--engine", "ray", "--set", f"address={cluster.address}")
        head = cluster.hosts[0].prefix
        done = _launch(tmp_path, *options, prefix=head, environment=cluster.environment)
    assert done.returncode == 0, done.stdout + done.stderr
    _check_report(tmp_path / "run", steps=4)
    assert "parity of 4 ranks" in done.stdout
