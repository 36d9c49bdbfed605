"""A run seen from outside: status, logs, stop; and the token, the addresses, the relay."""

from __future__ import annotations

import json
import os
import pty
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seqpar.errors import JobSpecError, LaunchError
from seqpar.launch.rundir import RunDir
from seqpar.launch.security import ensure_token, is_loopback, require_token, token_environment
from seqpar.launch.submit import RemoteJobs
from seqpar.launch.watch import find_run, run_status

WAITING = """
from seqpar.launch.context import current_run
print("hello from", rank, flush=True)
current_run().report(step=4, loss=2.5, tokens_per_s=1000.0)
while True: time.sleep(0.1)
"""


def test_a_run_is_watched_read_and_stopped(seqpar, write_script, tmp_path):
    script = write_script(WAITING)
    command = [sys.executable, "-m", "seqpar.cli", "launch", "--nproc", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **quiet)
    run = RunDir(tmp_path / "runs" / "train")
    while launcher.poll() is None and len(run.progress()) < 2:
        time.sleep(0.05)
    status = json.loads(outcome_of(command, tmp_path, environment, "status", "train", "--json"))
    assert (status["state"], status["engine"], status["ranks"]) == ("running", "local", 2)
    assert [rank["step"] for rank in status["by_rank"]] == [4, 4]
    assert all(rank["heard_s"] < 10 and rank["memory_bytes"] > 1e7 for rank in status["by_rank"])
    table = outcome_of(command, tmp_path, environment, "status", str(run.path))
    assert "train: running (local)" in table
    assert "2.5000" in table
    text = outcome_of(command, tmp_path, environment, "logs", "train", "--rank", "1")
    assert text == "hello from 1\n"
    assert outcome_of(command, tmp_path, environment, "stop", "train") == "stopped\n"
    _, stderr = launcher.communicate(timeout=20)
    assert launcher.returncode == 143
    assert "stopped by SIGTERM" in stderr
    assert outcome_of(command, tmp_path, environment, "stop", "train") == "had ended before\n"
    assert run_status(run)["state"] == "failed"
    assert all(not Path(f"/proc/{beat['pid']}").exists() for beat in run.beats().values())


def outcome_of(command: list[str], folder: Path, environment: dict, *arguments: str) -> str:
    words = [*command[:3], *arguments]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_run_whose_launcher_is_gone_is_lost(tmp_path):
    run = RunDir(tmp_path)
    run.prepare()
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    run.write_state(state="running", launcher_pid=child.pid, started=time.time())
    assert run_status(run)["state"] == "lost"


def test_an_unknown_run_is_answered_with_those_there_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    RunDir(tmp_path / "runs" / "first").path.mkdir(parents=True)
    (tmp_path / "runs" / "first" / "run.json").write_text("{}")
    with pytest.raises(JobSpecError, match="there are first"):
        find_run("second")


def test_rank_0_has_the_terminal_that_the_launcher_has(write_script, tmp_path):
    script = write_script("print('tty', sys.stdout.isatty(), rank)\n")
    command = [sys.executable, "-m", "seqpar.cli", "launch", "--nproc", "2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    master, slave = pty.openpty()
    launcher = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=slave, stderr=slave)
    assert launcher.wait(60) == 0
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert "tty True 0" in shown
    assert "tty" not in shown.replace("tty True 0", "")
    logs = tmp_path / "runs" / "train" / "logs"
    assert "tty True 0" in (logs / "rank-0.log").read_text()
    assert "tty False 1" in (logs / "rank-1.log").read_text()


def test_the_token_is_made_private_and_kept_out_of_the_environment(tmp_path, monkeypatch):
    path = tmp_path / "ray" / "token"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    settings = token_environment()
    token = path.read_text()
    assert len(token) == 64
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert settings == {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    path.chmod(0o644)  # as Ray itself leaves it
    ensure_token(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text() == token


def test_another_machine_is_not_spoken_to_without_its_token(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    with pytest.raises(LaunchError, match="there is no token for it"):
        RemoteJobs("http://192.0.2.7:8265")
    with pytest.raises(LaunchError, match="there is no token for it"):
        require_token("192.0.2.7:6379")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("10.0.0.1", False), ("h", False)],
)
def test_loopback_is_told_from_the_rest(host, loopback):
    assert is_loopback(host) is loopback


def test_an_address_where_nothing_answers_is_told_at_once(tmp_path, monkeypatch):
    started = time.monotonic()
    with pytest.raises(LaunchError, match=r"nothing answers at 127\.0\.0\.1:9"):
        RemoteJobs("http://127.0.0.1:9")
    with pytest.raises(JobSpecError, match="none of a dashboard"):
        RemoteJobs("127.0.0.1:9")
    assert time.monotonic() - started < 5


def test_a_ray_job_at_an_address_where_nothing_answers_starts_nothing(seqpar, write_script):
    script = write_script("")
    options = ("--engine", "ray", "--set", "address=127.0.0.1:9")
    outcome = seqpar("launch", *options, script)
    assert outcome.returncode == 1
    assert outcome.stderr.strip().splitlines()[-1].startswith("seqpar: nothing answers at")


def test_reports_are_kept_as_json_lines_and_tensorboard_events(seqpar, write_script, tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    script = write_script(
        """
        from seqpar.launch.context import current_run
        for step in range(3):
            current_run().report(step=step, loss=2.0 - step / 2)
            time.sleep(1.2)
        """
    )
    outcome = seqpar("launch", "--nproc", 1, "--set", "tensorboard=true", script)
    assert outcome.returncode == 0, outcome.stderr
    run = tmp_path / "runs" / "train"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(0, 2.0), (1, 1.5), (2, 1.0)]
    events = event_accumulator.EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss/rank-0")]
    assert found == [(0, 2.0), (1, 1.5), (2, 1.0)]


def test_a_port_in_use_is_refused_before_anything_starts(seqpar, write_script, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = seqpar("launch", "--nproc", 1, "--set", f"port={port}", write_script(""))
    assert outcome.returncode == 2
    assert f"port {port} cannot be had" in outcome.stderr
    assert not (tmp_path / "runs").exists()
