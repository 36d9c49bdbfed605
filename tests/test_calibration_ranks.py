"""A machine is measured on ranks of its own, and what it wrote is a cost file that plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from seqpar.calibration_ranks import CalibrationJob, calibrate_machine
from seqpar.cli import app
from seqpar.errors import MeshError, PlanError
from seqpar.planners import Cluster, CostModel, Planner, ScatterProblem


def test_calibrate_writes_a_cost_file_that_plans(tmp_path: Path) -> None:
    path = tmp_path / "cost.json"
    words = ["calibrate", "--out", str(path), "--device", "cpu", "--ranks", "2", "--dim", "64"]
    result = CliRunner().invoke(app, [*words, "--longest-tokens", "512", "--json"])
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert {row["degree"] for row in data["measurements"]} == {1, 2}
    assert {(row["degree"], row["message_bytes"]) for row in data["collectives"]} == {
        (2, 2**14),
        (2, 2**18),
        (2, 2**22),
    }
    assert all(row["ms"] > 0 for row in data["collectives"])
    cost = CostModel.load(str(path))
    assert cost.errors["worst_relative"] < 2
    assert cost.group_ms([4096], 1) > cost.group_ms([512], 1) > 0
    measured = max(data["measurements"], key=lambda row: row["ms"])
    predicted = cost.group_ms(measured["lengths"], measured["degree"])
    assert predicted == pytest.approx(measured["ms"], rel=cost.errors["worst_relative"] + 1e-6)
    problem = ScatterProblem((900, 50, 30), Cluster(devices=2, memory_bytes=2**30), cost)
    Planner(time_limit_ms=5).plan(problem).verify(problem)


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(MeshError, match="at least 1 rank"):
        calibrate_machine(CalibrationJob(ranks=0))
    with pytest.raises(MeshError, match="CUDA devices"):
        calibrate_machine(CalibrationJob(ranks=1000, device="cuda"))
    found = CliRunner().invoke(app, ["calibrate", "--dim", "100", "--heads", "3"])
    assert isinstance(found.exception, PlanError)
