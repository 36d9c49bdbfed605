"""The command line: quick help, one-line errors, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

HEAVY = ("torch", "numpy", "ray", "numba", "pulp", "pydantic", "transformers", "matplotlib")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "seqpar.cli", *arguments], capture_output=True, text=True, timeout=60
    )


def test_help_imports_nothing_heavy():
    code = f"import sys, seqpar.cli; print([m for m in {HEAVY!r} if m in sys.modules])"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.stdout.strip() == "[]", outcome.stderr


def test_help_answers_in_under_400_ms():
    def seconds() -> float:
        start = time.perf_counter()
        assert run("--help").returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.4


def test_help_names_every_command():
    text = run("--help").stdout
    for name in ("launch", "plan", "simulate", "calibrate", "check", "doctor", "bench"):
        assert f" {name} " in text


@pytest.mark.parametrize("name", ["launch", "doctor"])
def test_a_command_loads_and_explains_itself(name):
    outcome = run(name, "--help")
    assert outcome.returncode == 0, outcome.stderr
    assert "--json" in outcome.stdout


def test_an_unknown_command_is_answered_with_the_nearest():
    outcome = run("lanch")
    assert outcome.returncode == 2
    assert "Did you mean 'launch'" in outcome.stderr


def test_bad_input_is_one_line_and_exit_code_2(tmp_path):
    outcome = run("launch", str(tmp_path / "none.yaml"))
    assert outcome.returncode == 2
    assert len(outcome.stderr.strip().splitlines()) == 1
    assert outcome.stderr.startswith("seqpar: no job file at")


def test_a_dry_run_starts_nothing_and_is_readable_by_machines(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('started')\n")
    outcome = run("launch", "--dry-run", "--json", "--nproc", "4", str(script), "--", "--steps")
    found = json.loads(outcome.stdout)
    assert len(found["ranks"]) == 4
    assert found["command"][-2:] == [str(script), "--steps"]
    assert outcome.returncode == 0


def test_doctor_reports_versions_and_engines():
    outcome = run("doctor", "--json")
    found = json.loads(outcome.stdout)
    assert outcome.returncode == 0
    assert found["versions"]["torch"].startswith("2.")
    assert found["engines"]["local"] == "ready"
    assert found["devices"][0]["device"] == "cpu"


def test_doctor_s_tables_say_whole_commands(capsys):
    from seqpar.commands.doctor import show
    from seqpar.launch.machine import Machine

    install = "pip install 'seqpar[ray]'"
    engines = {"local": "ready", "ray": f"needs ray: {install}"}
    show(Machine({"python": "3.12"}, {"ray": install}, [], engines, {}))
    assert capsys.readouterr().out.count("seqpar[ray]") == 2


def test_bench_leaves_out_what_the_machine_cannot_run():
    import torch

    if torch.cuda.device_count():
        pytest.skip("CUDA devices: the benchmarks would run")
    outcome = run("bench", "lightning", "state", "--json")
    assert outcome.returncode == 0, outcome.stderr
    assert json.loads(outcome.stdout)["state"] == "left out: needs 2 CUDA devices, found 0"
    assert run("bench", "nothing").returncode == 2
